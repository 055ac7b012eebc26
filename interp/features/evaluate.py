"""Judging a sparse autoencoder: what it costs the model, what it leaves out, how it fires, how its decoder lies.

    found = evaluate_sae(model, sae, Corpus.from_file(model, "held-out.jsonl"), ablation="both")
    print(found)                                        # found.fvu, found.ce_recovered["mean"], found.density, ...
    evaluate_reconstruction(sae, activations)           # without a model

y is what is reconstructed (the input x, or a transcoder's target), e = y - yhat; sums run over all tokens of the set, in float64:

    FVU          = sum |e|^2 / sum |y - mean y|^2           1 - FVU is the explained variance; a constant output has FVU 1
    NMSE         = sum |e|^2 / sum |y|^2                    here what the mean explains counts too, and it may be nearly all
    g            = sum |yhat|^2 / sum <y, yhat>             yhat / g fits best; below 1, reconstructions are too small
    CE recovered = (CE_ablated - CE_sae) / (CE_ablated - CE)
    KL score     = (KL_ablated - KL_sae) / KL_ablated       KL(model || changed model)

FVU is a ratio of sums over the set; means of ratios per batch are other numbers, and so is Var(e) / Var(y), in which a constant
offset of e costs nothing. CE recovered depends on what "ablated" means, so it is kept by name. With h latents, f_i the code times
its decoder row's norm and v = sum_i f_i u_i, a token also says how far unit rows u_i are from orthogonal (2503.24277):

    eLBO   = | |y|^2 - |f|^2 | / ((h - 1) |f|^2)            |f|^2 with the bias as a feature; contains the reconstruction error
    eLBO_1 = | |v|^2 - |f|^2 | / (|f|_1^2 - |f|_2^2)        ours: at most max |<u_i, u_j>|, exactly, and without h

None of this shows that latents mean anything: random dictionaries go far in it (`random_baseline`), and where the truth is known
(`interp.features.recovery`) the highest explained variance may belong to the SAE that found nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm import tqdm

from interp.errors import OptionError, SiteError, TaskError, one_of
from interp.features.activations import top_k
from interp.features.codes import Codes
from interp.features.sae import SAE
from interp.features.sources import Corpus
from interp.features.splice import place_saes
from interp.model.run import config_of, record
from interp.precision import at_least_float32

DENSE = 0.1  # latents that fire on a larger share of tokens are called dense
_ENTRIES = 2**24  # of tokens x latents, or latents x latents, that are held at once
_LOGITS = 2**22  # of tokens x vocabulary that are looked at in float64 at once


@dataclass(frozen=True, kw_only=True, eq=False)
class Reconstruction:
    """What `evaluate_reconstruction` found, of n_tokens tokens; shares are of 1, lengths in the activations' own unit.

    cosine: of y and yhat; norm_ratio: |yhat| / |y|; both means over tokens with y != 0. bias: g of the module's docstring.
    l0, l1: latents with f != 0 and sum |f_i| |w_i|, means over tokens. elbo, elbo_1: medians; of eLBO_1, over tokens that have a
    value (see `token_geometry`). coherence, mean_coherence: of `decoder_coherence`, where they were asked for.
    A ratio over nothing is NaN. `sae.folded()` has the same numbers, norms of encoder and decoder apart.
    """

    n_tokens: int
    fvu: float
    nmse: float
    cosine: float
    norm_ratio: float
    bias: float
    l0: float
    l1: float
    elbo: float
    elbo_1: float
    density: Float[Tensor, " latent"] = field(repr=False)  # firings / tokens
    decoder_norm: Float[Tensor, " latent"] = field(repr=False)
    alive: int  # latents that fired on any token; of a small set, rare ones are not among them
    dead: float  # share that did not
    dense: float  # share that fires on more than `DENSE` of the tokens
    encoder_norm: Float[Tensor, " n_pre"] = field(repr=False)
    # None of transcoders, whose two sides are different spaces, and of kron encoders, which have no row for each latent
    decoder_encoder_cosine: Float[Tensor, " latent"] | None = field(repr=False)
    coherence: float | None
    mean_coherence: float | None
    normalize: str
    select: str

    @property
    def explained_variance(self) -> float:
        """1 - FVU."""
        return 1 - self.fvu

    def to_dict(self) -> dict[str, Any]:
        """Everything but the values per latent, of which there are means, ready for JSON: NaN and infinity become None."""
        names = [*(f.name for f in fields(self)), "explained_variance"]
        return {name: _plain(getattr(self, name)) for name in names}

    def __str__(self) -> str:
        lines = [
            f"FVU {self.fvu:.4g} (explained {self.explained_variance:.2%}), NMSE {self.nmse:.4g}, cosine {self.cosine:.4f}, "
            f"|xhat|/|x| {self.norm_ratio:.4f}, g {self.bias:.4f}",
            f"L0 {self.l0:.2f}, L1 {self.l1:.4g}; {self.alive} of {len(self.density)} latents alive ({self.dead:.1%} dead), "
            f"{self.dense:.1%} dense (on more than {DENSE:.0%} of tokens)",
            f"geometry: median eLBO {self.elbo:.3g}, eLBO_1 {self.elbo_1:.3g}"
            + ("" if self.coherence is None else f"; coherence {self.coherence:.3f}, mean {self.mean_coherence:.4f}"),
        ]
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True, eq=False)
class SAEEvaluation(Reconstruction):
    """What `evaluate_sae` found: a `Reconstruction`, and what becomes of the model's predictions, in nats.

    ce: of the model as it is; ce_sae: with xhat in the place of x; ce_ablated, ce_recovered, kl_ablated, kl_score: by the kind
    of ablation ("zero", "mean"). n_predictions: targets that CE and KL are means over.
    """

    model: str
    corpus: str
    hook: str  # whose activation is reconstructed
    n_predictions: int
    ce: float
    ce_sae: float
    ce_ablated: dict[str, float]
    ce_recovered: dict[str, float]
    kl: float
    kl_ablated: dict[str, float]
    kl_score: dict[str, float]

    def __str__(self) -> str:
        lines = [
            f"{self.model} {self.hook}: {self.n_tokens} tokens, {self.corpus}; normalize {self.normalize}, select {self.select}",
            f"CE {self.ce:.4f} nats, with the SAE {self.ce_sae:.4f}, KL {self.kl:.4f} ({self.n_predictions} predictions)",
        ]
        lines += [
            f"recovered from {kind} ablation (CE {self.ce_ablated[kind]:.4f}, KL {self.kl_ablated[kind]:.4f}): "
            f"CE {self.ce_recovered[kind]:.2%}, KL {self.kl_score[kind]:.2%}"
            for kind in self.ce_ablated
        ]
        return "\n".join([*lines, super().__str__()])


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        value = float(value.mean())
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    return None if isinstance(value, float) and not np.isfinite(value) else value


def token_geometry(
    sae: SAE, x: Float[Tensor, "token d_in"], y: Float[Tensor, "token d_out"], codes: Codes, yhat: Float[Tensor, "token d_out"]
) -> dict[str, Float[Tensor, " token"]]:  # fmt: skip
    """Lengths of tokens and of their codes, in float64 and the activations' unit: x_norm, code_norm, elbo, elbo_1, l0, l1.

    x_norm: |y|, raw and uncentred. code_norm: root of sum_i (f_i |w_i|)^2 + |c|^2, c being what the SAE writes when no latent
    fires: b_dec, of a skip transcoder W_skip x too, of layer_norm the token's mean too. elbo: NaN where code_norm is 0 and of a
    single latent. elbo_1: NaN where fewer than two latents fire, or none beside one but what rounding is as large as: such a
    token says nothing about any pair. l1: sum_i |f_i| |w_i|.
    """
    factor = sae.normalize(x)[1][0].double().reshape(-1)  # the weights may see another scale; of one token, or of all
    entries = codes.values.double().abs() * sae.W_dec.norm(dim=1).double()[codes.latents]
    l1, square, l0 = codes.row_sums(entries), codes.row_sums(entries.square()), codes.row_sums((entries > 0).double())
    written = codes.decode(sae.W_dec).double()
    rest = (yhat.double() - factor[:, None] * written).square().sum(1)
    length, with_rest = y.double().square().sum(1), factor.square() * square + rest
    elbo = (length - with_rest).abs() / ((sae.config.d_sae - 1) * with_rest)
    pairs = l1.square() - square
    elbo_1 = (written.square().sum(1) - square).abs() / pairs
    paired = (l0 > 1) & (pairs > torch.finfo(sae.dtype).eps ** 0.5 * square)
    return {
        "x_norm": length.sqrt(), "code_norm": with_rest.sqrt(), "elbo": elbo.where(elbo.isfinite(), torch.nan),
        "elbo_1": elbo_1.where(paired, torch.nan), "l0": codes.row_sums((codes.values != 0).double()), "l1": factor * l1,
    }  # fmt: skip


class _Sums:
    """What is summed over tokens: a batch is seen once and forgotten, but for its tokens' eLBO (two numbers each)."""

    def __init__(self, sae: SAE, select: str):
        self.sae, self.select, self.n = sae, select, 0
        self.mean = torch.zeros(sae.config.out, dtype=torch.float64, device=sae.device)
        self.scatter = torch.zeros((), dtype=torch.float64, device=sae.device)
        self.fired = torch.zeros(sae.config.d_sae, dtype=torch.int64, device=sae.device)
        self.sums: dict[str, Tensor] = {}
        self.elbos: list[Float[Tensor, "2 token"]] = []

    def add(self, x: Float[Tensor, "token d_in"], y: Float[Tensor, "token d_out"]) -> Float[Tensor, "token d_out"]:
        """yhat of these tokens, in the SAE's dtype, after they have been counted."""
        size = max(1, _ENTRIES // self.sae.config.d_sae)
        parts = [self._add(*part) for part in zip(x.split(size), y.split(size), strict=True)] if len(x) else []
        return torch.cat(parts) if parts else torch.zeros(0, self.sae.config.out, dtype=x.dtype, device=x.device)

    def _add(self, x: Tensor, y: Tensor) -> Tensor:
        sae = self.sae
        x, y = x.to(sae.device, sae.dtype), y.to(sae.device).double()
        codes = sae.codes(x, select=self.select)
        result = sae.reconstruct(x, codes)
        yhat, token = result.double(), token_geometry(sae, x, y, codes, result)
        norm, dot = yhat.norm(dim=1), (y * yhat).sum(1)
        length = token["x_norm"]
        there = length > 0
        for name, values in {
            "error": (y - yhat).square(), "y": y.square(), "yhat": yhat.square(), "dot": dot, "there": there,
            "cosine": dot[there] / (length * norm)[there].clamp_min(torch.finfo(torch.float64).tiny),
            "ratio": norm[there] / length[there], "l0": token["l0"], "l1": token["l1"],
        }.items():  # fmt: skip
            self.sums[name] = self.sums.get(name, 0.0) + values.sum(dtype=torch.float64)
        self.fired += torch.bincount(codes.latents[codes.values != 0], minlength=sae.config.d_sae)
        self.elbos.append(torch.stack([token["elbo"], token["elbo_1"]]).cpu())
        # about the mean so far, then corrected (Chan et al. 1979): sum |y|^2 - n |mean|^2 would cancel where the mean is large
        mean, n = y.mean(0), self.n + len(y)
        away = mean - self.mean
        self.scatter += (y - mean).square().sum() + away.square().sum() * (self.n * len(y) / n)
        self.mean += away * (len(y) / n)
        self.n = n
        return result

    def figures(self, coherence: bool) -> dict[str, Any]:
        """The fields of a `Reconstruction`."""
        sae, sums = self.sae, {name: float(value) for name, value in self.sums.items()}
        encoder, decoder = sae.encoder.detach().double(), sae.W_dec.detach().double()
        paired = not sae.config.transcoder and sae.config.kron is None
        density, alive = self.fired.double() / self.n, int((self.fired > 0).sum())
        largest, mean = decoder_coherence(sae.W_dec) if coherence else (None, None)
        known = (values[~values.isnan()].numpy() for values in torch.cat(self.elbos, 1))
        elbo, elbo_1 = (float(np.median(values)) if values.size else float("nan") for values in known)
        return {
            "n_tokens": self.n, "fvu": _ratio(sums["error"], float(self.scatter)), "nmse": _ratio(sums["error"], sums["y"]),
            "cosine": _ratio(sums["cosine"], sums["there"]), "norm_ratio": _ratio(sums["ratio"], sums["there"]),
            "bias": _ratio(sums["yhat"], sums["dot"]), "l0": sums["l0"] / self.n, "l1": sums["l1"] / self.n,
            "elbo": elbo, "elbo_1": elbo_1, "density": density, "alive": alive, "dead": 1 - alive / len(density),
            "dense": float((density > DENSE).double().mean()),
            "decoder_norm": decoder.norm(dim=1), "encoder_norm": encoder.norm(dim=1),
            "decoder_encoder_cosine": F.cosine_similarity(decoder, encoder, dim=1) if paired else None,
            "coherence": largest, "mean_coherence": mean, "normalize": sae.config.normalize, "select": self.select,
        }  # fmt: skip


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else float("nan")


@torch.no_grad()
def evaluate_reconstruction(
    sae: SAE, x: Float[Tensor, "token d_in"], y: Float[Tensor, "token d_out"] | None = None, *,
    select: Literal["own", "afa"] = "own", coherence: bool = False,
) -> Reconstruction:  # fmt: skip
    """How well activations are reconstructed and how latents fire on them; y: targets, if they are not the inputs.

    select: "afa" lets top-AFA choose the latents. coherence: look at all pairs of decoder rows too, 2 h^2 d FLOPs.
    Raises `OptionError` for shapes that do not fit, no tokens, and a transcoder without targets.
    """
    one_of(select, ("own", "afa"), "way to select latents")
    sums = _Sums(sae, select)
    sums.add(x, targets(sae, x, y))
    return Reconstruction(**sums.figures(coherence))


def targets(sae: SAE, x: Float[Tensor, "token d_in"], y: Float[Tensor, "token _"] | None) -> Float[Tensor, "token _"]:
    """What the SAE is to reconstruct: y, or without one x. Raises `OptionError` where inputs and targets do not fit it."""
    if y is None and sae.config.transcoder:
        raise OptionError("a transcoder reconstructs another activation than its input: give the targets, y")
    y = x if y is None else y
    for name, rows, width in (("inputs", x, sae.config.d_in), ("targets", y, sae.config.out)):
        if rows.shape != (len(x), width) or not len(x):
            raise OptionError(f"{name} are [token, {width}], as many of one as of the other, not {list(rows.shape)}")
    return y


@torch.no_grad()
def random_baseline(sae: SAE, x: Float[Tensor, "token d"], *, seed: int) -> float:
    """FVU of a dictionary that learned nothing: as many latents, as many of them firing, but random directions.

    xhat = mean x + c f D, D random unit rows, f the k largest of ReLU((x - mean x) D^T), k the SAE's L0 rounded (at least 1), c
    the scalar that fits best: FVU = 1 - (sum <x - mean x, f D>)^2 / (sum |x - mean x|^2 sum |f D|^2). Raises `OptionError` of a
    transcoder, whose encoder and decoder live in different spaces.
    """
    if sae.config.transcoder:
        raise OptionError("a random dictionary reconstructs its own input: there is no such baseline of a transcoder")
    sums, size = _Sums(sae, "own"), max(1, _ENTRIES // sae.config.d_sae)
    sums.add(x, targets(sae, x, None))
    k = max(1, round(float(sums.sums["l0"]) / sums.n))
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(sae.config.d_sae, x.shape[1], generator=generator)
    atoms = F.normalize(drawn.to(sae.device, torch.promote_types(sae.dtype, drawn.dtype)), dim=1)
    dot, square = 0.0, 0.0
    for part in x.split(size):
        centred = (part.to(sae.device).double() - sums.mean).to(atoms.dtype)
        found = top_k(centred @ atoms.T, k).decode(atoms).double()
        dot += float((found * centred).sum())
        square += float(found.square().sum())
    return 1 - _ratio(dot**2, square * float(sums.scatter))


@torch.no_grad()
def decoder_coherence(decoder: Float[Tensor, "latent d"]) -> tuple[float, float]:
    """(max, mean) over pairs i != j of |<u_i, u_j>|, u_i being rows scaled to norm 1; zero rows are left out; NaN without a pair.

    In blocks of rows, in float32 at least; h^2 d multiplications. The max is at least sqrt((h - d) / (d (h - 1))) (Welch 1974).
    """
    rows = at_least_float32(decoder)
    rows = F.normalize(rows[rows.norm(dim=1) > 0], dim=1)
    n, largest, total = len(rows), 0.0, 0.0
    if n < 2:
        return float("nan"), float("nan")
    for block in torch.arange(n, device=rows.device).split(max(1, _ENTRIES // n)):
        cosines = (rows[block] @ rows.T).abs()
        cosines[torch.arange(len(block), device=rows.device), block] = 0
        largest = max(largest, float(cosines.amax()))
        total += float(cosines.sum(dtype=torch.float64))
    return largest, total / (n * (n - 1))


# --------------------------------------------------------------------------------------------------------- on a model


@torch.no_grad()
def evaluate_sae(
    model, sae: SAE, corpus: Corpus, *, batch_size: int = 16, ablation: Literal["zero", "mean", "both"] = "zero",
    select: Literal["own", "afa"] = "own", exclude: Sequence[int] = (), coherence: bool = False, progress: bool = False,
) -> SAEEvaluation:  # fmt: skip
    """What the SAE is worth to the model on a text, and everything of `evaluate_reconstruction`, at the place it writes.

    Tokens that count are those of `Corpus.mask`: not first in their sequence, not of `exclude`. Only there is the activation
    replaced, by xhat (the error dropped), by 0 or by its mean over the tokens that count; elsewhere it passes as it is. CE is of
    every next token that is there, in nats, KL of the same predictions. Mean ablation takes a pass over the text before,
    for the mean. batch_size: sequences per forward pass; held at once are a batch's activations and two batches of logits.
    Raises `SiteError` where the SAE does not fit the model, `TaskError` where no token counts.
    """
    one_of(ablation, ("zero", "mean", "both"), "kind of ablation")
    one_of(select, ("own", "afa"), "way to select latents")
    if batch_size < 1:
        raise OptionError(f"a batch needs at least one sequence, not {batch_size}")
    (read,) = place_saes(model, sae)
    write = sae.config.target_hook or read
    counts = corpus.mask(exclude=exclude)
    if not counts.any():
        raise TaskError(f"no token of {corpus.name} is left to judge by")
    there, batches = corpus.mask(skip_first=False), []
    for chunk in torch.arange(len(corpus.tokens)).split(batch_size):
        width = int(corpus.lengths[chunk].max())  # no needless padding
        batches.append([part[chunk, :width].to(model.W_E.device) for part in (corpus.tokens, counts, there)])
    kinds = ("zero", "mean") if ablation == "both" else (ablation,)
    replaced = {kind: torch.zeros((), dtype=torch.float64) for kind in kinds}
    if "mean" in kinds:
        for tokens, where, _ in tqdm(batches, desc="mean", unit="batch", disable=not progress):
            values = record(model, tokens, [write], copy=False)[write].flatten(2)[where]
            replaced["mean"] = replaced["mean"].to(values.device) + values.double().sum(0) / int(counts.sum())
    sums, scores = _Sums(sae, select), _Scores(("model", "sae", *kinds))
    for tokens, where, there in tqdm(batches, desc="evaluate", unit="batch", disable=not progress):
        base, x, y = _run(model, sae, tokens, where, read, write)
        scores.add("model", base, base, tokens, there[:, 1:])
        for name, new in {"sae": sums.add(x, y), **replaced}.items():
            changed = [(write, _replace(where, new))]
            scores.add(name, model.run_with_hooks(tokens, fwd_hooks=changed), base, tokens, there[:, 1:])
    ce, kl = ({name: total / scores.n for name, total in totals.items()} for totals in (scores.ce, scores.kl))
    return SAEEvaluation(
        model=config_of(model).name, corpus=corpus.name, hook=write, n_predictions=scores.n,
        ce=ce["model"], ce_sae=ce["sae"], ce_ablated={kind: ce[kind] for kind in kinds},
        ce_recovered={kind: _ratio(ce[kind] - ce["sae"], ce[kind] - ce["model"]) for kind in kinds},
        kl=kl["sae"], kl_ablated={kind: kl[kind] for kind in kinds},
        kl_score={kind: _ratio(kl[kind] - kl["sae"], kl[kind]) for kind in kinds}, **sums.figures(coherence),
    )  # fmt: skip


def _run(model, sae: SAE, tokens: Tensor, where: Tensor, read: str, write: str) -> tuple[Tensor, Tensor, Tensor]:
    """(logits, what the SAE reads, what it is to reconstruct) of the model as it is, at the tokens that count."""
    values: dict[str, Tensor] = {}
    names = [*dict.fromkeys((read, write))]
    hooks = [(name, lambda value, hook, name=name: values.update({name: value.flatten(2)[where]})) for name in names]
    logits = model.run_with_hooks(tokens, fwd_hooks=hooks)
    if [*values] != names:
        raise SiteError(
            f"the SAE needs {' and then '.join(names)}, and the model passes {', '.join(values) or 'neither'}"
        )
    for name, width, does in ((read, sae.config.d_in, "reads"), (write, sae.config.out, "writes")):
        if values[name].shape[1] != width:
            raise SiteError(f"the SAE {does} {width} channels, and {name} has {values[name].shape[1]}")
    return logits, values[read], values[write]


def _replace(where: Bool[Tensor, "batch position"], new: Tensor):
    """A hook that puts `new` (rows, one row or a number) in the place of the tokens that count."""
    return lambda value, hook: value.flatten(2).index_put((where,), new.to(value)).reshape(value.shape)


class _Scores:
    """Sums of the next tokens' cross-entropy, and of KL(model || changed model), by name."""

    def __init__(self, names: Sequence[str]):
        self.n, self.ce, self.kl = 0, dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)

    def add(self, name: str, logits: Tensor, base: Tensor, tokens: Tensor, there: Tensor) -> None:
        """A batch of logits, beside those of the model as it is."""
        self.n += int(there.sum()) if name == "model" else 0
        for places in there.nonzero().split(max(1, _LOGITS // logits.shape[2])):
            s, t = places.unbind(1)
            q = logits[s, t].double().log_softmax(1)
            self.ce[name] += float(F.nll_loss(q, tokens[s, t + 1], reduction="sum"))
            if name != "model":
                p = base[s, t].double().log_softmax(1)
                self.kl[name] += float(F.kl_div(q, p, log_target=True, reduction="sum"))
