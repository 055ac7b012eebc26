"""What a neuron is about, as vectors to compare with tokens: which rows of which matrix, and which tokens' vectors.

Neuron n of an MLP with a norm in front (gain g) reads the stream x through rows and writes a row to it,

    up_n = (g * W_in[:, n]) . x / |x|        gate_n = (g * W_gate[:, n]) . x / |x|        written: post_n W_out[n, :]

(|x|: what the norm divides by). Put through the unembedding, rows w become scores of tokens, w . u_t. The literature leaves open
how, and the answer changes the order of tokens, so a `Reading` says it and goes with every result:

    matrix      "up", "gate" (what is read), "down" (what is written). Gated neurons fire as f(a . x) (b . x), with both signs:
                positively where x agrees with the gate's a and with the up row's b, "gate+up": a/|a| + b/|b|; negatively where it
                agrees with a and is against b, "gate-up": a/|a| - b/|b|. On the first the neuron writes its down row, on the
                second minus that.
    fold_norm   the gain of the norm in front is part of up and gate rows, that of a norm behind the MLP part of down rows.
    center_rows a row's mean over its entries is taken off, which a LayerNorm does to what it is applied to.
    final_norm  "none": w. "unit": w / |w|, which changes no neuron's order. "full": the model's last norm without bias and eps,
                g_final * Cw / rms(Cw), C centring where it centres.
    score       "logit": w . u. "cosine": w . u / |w||u|. "zscore": the logit, less its mean over all neurons of the layer, in
                standard deviations over them. Only the last two compare neurons with each other.
    vocabulary  "unembed": u_t is a column of W_U. "embed": a row of W_E.
    center      the mean of all u_t is taken off them; no probability depends on it.

Early layers do not speak the unembedding's language (tuned lenses are trained for that): their readings drift.
W_in here is W_up elsewhere, and a "row" is a neuron's vector however the matrix is stored.
"""

from dataclasses import asdict, dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from interp.errors import OptionError, SiteError, one_of
from interp.model.folding import centred, gain
from interp.model.run import canonical
from interp.model.transformer import Norm, Transformer
from interp.precision import at_least_float32

MATRICES = ("up", "gate", "down", "gate+up", "gate-up")
FINAL_NORMS = ("none", "unit", "full")
SCORES = ("logit", "cosine", "zscore")
VOCABULARIES = ("unembed", "embed")

_ENTRIES = 2**24  # of tokens x channels that are looked at once


@dataclass(frozen=True)
class Reading:
    """How neurons are read as tokens; see the module. None: the model decides, and `of` fills it in.

    center_rows: default where the norm in front of the MLP (for down: behind it) centres. final_norm: default "full" for down,
    "none" for what is read.
    """

    matrix: Literal["up", "gate", "down", "gate+up", "gate-up"] = "up"
    fold_norm: bool = True
    center_rows: bool | None = None
    final_norm: Literal["none", "unit", "full"] | None = None
    score: Literal["logit", "cosine", "zscore"] = "cosine"
    vocabulary: Literal["unembed", "embed"] = "unembed"
    center: bool = False

    def __post_init__(self) -> None:
        one_of(self.matrix, MATRICES, "matrix of neurons")
        one_of(self.score, SCORES, "score of tokens")
        one_of(self.vocabulary, VOCABULARIES, "table of tokens' vectors")
        if self.final_norm is not None:
            one_of(self.final_norm, FINAL_NORMS, "way to apply the final norm")

    @property
    def poles(self) -> tuple[str, ...]:
        """Signs that the rows are read with: both, but for joint readings of gate and up, which are one pole each."""
        return {"gate+up": ("+",), "gate-up": ("-",)}.get(self.matrix, ("+", "-"))

    def of(self, model: Transformer) -> "Reading":
        """The same with every option decided for this model. Raises `OptionError` for gate readings of a plain MLP."""
        canonical(model, "reading neurons as tokens")
        if "gate" in self.matrix and not model.cfg.gated:
            raise OptionError(f"{model.cfg.name} has no gates to read: its MLPs are plain (choose from up, down)")
        norm = _folded_norm(model, 0, self.matrix)
        return replace(
            self,
            center_rows=(norm is not None and norm.centred) if self.center_rows is None else self.center_rows,
            final_norm=self.final_norm or ("full" if self.matrix == "down" else "none"),
        )

    def to_dict(self) -> dict[str, str | bool | None]:
        """The options as plain values, for a file."""
        return asdict(self)


@torch.no_grad()
def reading_rows(model: Transformer, layer: int, reading: Reading) -> Float[Tensor, "neuron d_model"]:
    """One vector per neuron of a layer, such that its products with `vocabulary_rows` are the scores (float32 at least).

    For score "zscore" they are so up to a factor by token, `token_deviations`. A row of zeros stays one.
    Raises `SiteError` where there is no such layer, `OptionError` as `Reading.of`.
    """
    reading = reading.of(model)
    if not 0 <= layer < model.cfg.n_layers:
        raise SiteError(f"{model.cfg.name} has layers 0 to {model.cfg.n_layers - 1}, not {layer}")
    mlp, norm = model.blocks[layer].mlp, _folded_norm(model, layer, reading.matrix)

    def folded(weight: Float[Tensor, "neuron d_model"]) -> Float[Tensor, "neuron d_model"]:
        rows = at_least_float32(weight)
        # in front of a matrix the gain comes before the centring, seen from the weights; behind one, after it
        steps = [lambda x: x * gain(norm)] if reading.fold_norm and norm is not None and norm.w is not None else []
        if reading.center_rows:
            steps.insert(0 if reading.matrix == "down" else len(steps), centred)
        for step in steps:
            rows = step(rows)
        return rows

    if reading.matrix == "down":
        rows = folded(mlp.W_out)
    elif reading.matrix in ("up", "gate"):
        rows = folded((mlp.W_in if reading.matrix == "up" else mlp.W_gate).T)
    else:
        gate, up = unit(folded(mlp.W_gate.T)), unit(folded(mlp.W_in.T))
        rows = gate + up if reading.matrix == "gate+up" else gate - up
    if reading.final_norm == "unit":
        rows = unit(rows)
    elif reading.final_norm == "full":
        rows = _final(model.ln_final, rows)
    if reading.score == "cosine":
        rows = unit(rows)
    elif reading.score == "zscore":
        rows = rows - rows.mean(0)
    elif reading.vocabulary == "unembed":
        rows = rows * model.cfg.logit_scale
    # one layout for all matrices, which the screening's products are fastest on
    return rows.to(at_least_float32(model.W_U).dtype).contiguous()


@torch.no_grad()
def vocabulary_rows(model: Transformer, reading: Reading) -> Float[Tensor, "vocabulary d_model"]:
    """One vector per token (float32 at least): of the unembedding or embedding, centred and of unit length as the reading says.

    Biases of the unembedding and a soft-cap of the logits are not in it.
    """
    reading = reading.of(model)
    rows = at_least_float32(model.W_U.T if reading.vocabulary == "unembed" else model.W_E)
    if reading.center:
        rows = rows - rows.mean(0)
    if reading.score == "cosine":
        rows = unit(rows)
    return rows.contiguous()


@torch.no_grad()
def token_deviations(
    rows: Float[Tensor, "neuron d"], vocabulary: Float[Tensor, "vocabulary d"]
) -> Float[Tensor, " vocabulary"]:
    """Standard deviation over neurons of each token's score, without the table of scores.

    sd_t = sqrt(u_t^T S u_t), S = sum_n (w_n - mean)(w_n - mean)^T / neurons. 0 where all neurons score a token alike.
    """
    # u^T S u = |L^T u|^2 for any S = L L^T: a sum of squares, which rounding cannot make negative
    centred = (rows - rows.mean(0)) / len(rows) ** 0.5
    factor = torch.linalg.qr(centred, mode="r").R if len(rows) > rows.shape[1] else centred
    parts = vocabulary.split(max(1, _ENTRIES // vocabulary.shape[1]))
    return torch.cat([(part @ factor.T).square().sum(1).sqrt() for part in parts])


def unit(rows: Float[Tensor, "row d"]) -> Float[Tensor, "row d"]:
    """Rows divided by their Euclidean length; zeros stay zeros."""
    length = rows.norm(dim=1, keepdim=True)
    return rows / torch.where(length > 0, length, torch.ones_like(length))


def _folded_norm(model: Transformer, layer: int, matrix: str) -> Norm | None:
    """The norm between the stream and these rows: in front of the MLP, or behind it for what is written."""
    block, cfg = model.blocks[layer], model.cfg
    if matrix == "down":
        return block.ln2_post if cfg.post_norm else None
    if not cfg.pre_norm:
        return None
    return block.ln1 if cfg.shared_norm else block.ln2


def _final(norm: Norm, rows: Float[Tensor, "row d"]) -> Float[Tensor, "row d"]:
    """The last norm on rows, without bias and eps: any positive multiple of a row gives the same."""
    rows = unit(centred(rows) if norm.centred else rows) * rows.shape[1] ** 0.5
    return rows if norm.w is None else rows * gain(norm)
