"""Directions to steer along, from whatever found them: features, latents, neurons, differences between texts.

With a the activation of a token at a hook point:

    DiffMeans        mean of a over the tokens of positive texts, minus its mean over those of negative texts
    contrast pairs   mean over pairs of a(positive) - a(negative), each at its last token     (CAA: Rimsky et al., 2312.06681)

DiffMeans leaves out first tokens, whether a beginning-of-text token or not: in most models their activations are of a size of
their own, whatever the text, and a mean over a few texts would be mostly them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from interp.errors import OptionError, SiteError, TaskError, one_of
from interp.features.sae import SAE
from interp.features.sources import Corpus
from interp.model.run import record
from interp.model.tokens import ids_of, pad, pad_id
from interp.steering.changes import Change, Positions, check_hook, one_hot


@dataclass(frozen=True, eq=False)
class Vector:
    """A direction at a hook point, as long as its source makes it, and what to call it."""

    hook: str
    direction: Float[Tensor, " d"]
    label: str

    def change(
        self, value: float | Float[Tensor, " batch"] | None = None,
        mode: Literal["add", "clamp", "scale", "ablate"] = "add", *, positions: Positions = "all",
    ) -> Change:  # fmt: skip
        """Steering along it. `value` counts in activation units: `vector.direction.norm()` adds the direction itself."""
        return Change(self.hook, self.direction, mode, value, positions)


def snmf_vector(snmf, feature: int) -> Vector:
    """A feature's neurons: z, a row of an `interp.SNMF`'s `components_`, at the hook that was factorised."""
    if snmf.components_ is None:
        raise OptionError("this SNMF has not been fitted: call fit first")
    if snmf.hook is None:
        raise SiteError("this SNMF does not say which hook its activations came from")
    if not 0 <= feature < len(snmf.components_):
        raise SiteError(f"the SNMF has features 0 to {len(snmf.components_) - 1}, not {feature}")
    return Vector(snmf.hook, torch.as_tensor(snmf.components_[feature]), f"SNMF {feature}")


def sae_vector(sae: SAE, latent: int) -> Vector:
    """A latent's decoder row, where the SAE writes (a transcoder at its target)."""
    hook = sae.config.target_hook or sae.config.hook
    if hook is None:
        raise SiteError("this SAE does not say which hook it belongs to")
    if not 0 <= latent < sae.config.d_sae:
        raise SiteError(f"the SAE at {hook} has latents 0 to {sae.config.d_sae - 1}, not {latent}")
    return Vector(hook, sae.W_dec[latent].detach(), f"latent {latent}")


def neuron_vector(model, layer: int, neuron: int) -> Vector:
    """One neuron at `mlp.hook_post`: adding v to it adds v W_out[neuron] to what the MLP writes (before a post-norm)."""
    direction = one_hot(model, hook := f"blocks.{layer}.mlp.hook_post", neuron)
    return Vector(hook, direction, f"neuron {layer}.{neuron}")


@torch.no_grad()
def diff_means(
    model, hook: str, positive: Sequence[str] | Corpus, negative: Sequence[str] | Corpus, *,
    positions: Literal["not first", "last"] = "not first", batch_size: int = 32, label: str = "DiffMeans",
) -> Vector:  # fmt: skip
    """mean a over positive texts - mean a over negative ones, every token counting alike; in float64, then the model's dtype.

    positions: all tokens "not first", or the "last" of each text. Texts get the model's own first token; a `Corpus` is taken as
    it is. Raises `SiteError` if the model has no such hook, `TaskError` if a side has no token that counts.
    """
    one_of(positions, ("not first", "last"), "choice of positions")
    means = []
    for side, texts in (("positive", positive), ("negative", negative)):
        sums, n = _sums(model, hook, _corpus(model, texts, f"the {side} texts"), positions, batch_size)
        means.append(sums / n)
    return Vector(hook, (means[0] - means[1]).to(model.W_E.dtype), label)


@torch.no_grad()
def contrast_pairs(
    model, hook: str, pairs: Sequence[tuple[str, str]], *, batch_size: int = 32, label: str = "contrast pairs"
) -> Vector:
    """mean over (positive, negative) pairs of the difference between their last tokens' activations.

    As each pair counts once, that is `diff_means` of the two sides with positions="last".
    """
    if not pairs:
        raise TaskError("there are no contrast pairs")
    positive, negative = ([pair[side] for pair in pairs] for side in (0, 1))
    return diff_means(model, hook, positive, negative, positions="last", batch_size=batch_size, label=label)


def _corpus(model, texts: Sequence[str] | Corpus, name: str) -> Corpus:
    """Whole texts: not cut into windows, whose ends would be no text's last token."""
    if isinstance(texts, Corpus):
        return texts
    if isinstance(texts, str):
        raise TaskError(f"{name} are one string: give a list of texts")
    if not len(texts):
        raise TaskError(f"{name} are none: give at least one")
    rows = [ids_of(model.tokenizer, text, prepend_bos=bool(model.cfg.prepend_bos)) for text in texts]
    if empty := [i for i, row in enumerate(rows) if not row]:
        raise TaskError(f"text {empty[0]} of {name} has no token")
    return Corpus(pad(rows, pad_id(model.tokenizer)), torch.tensor([len(row) for row in rows], dtype=torch.int64), name)


def _sums(model, hook: str, corpus: Corpus, positions: str, batch_size: int) -> tuple[Float[Tensor, " d"], int]:
    """The sum of activations over the tokens that count, in float64, and how many they are."""
    check_hook(model, hook)
    if batch_size < 1:
        raise OptionError(f"cannot run {batch_size} texts at a time")
    if positions == "last":
        counts = torch.arange(corpus.tokens.shape[1]) == corpus.lengths[:, None] - 1
    else:
        counts = corpus.mask()
    if not counts.any():
        raise TaskError(f"{corpus.name} have no token that counts: first ones are left out")
    total = torch.zeros((), dtype=torch.float64, device=model.W_E.device)
    # texts of like lengths together, so that little is run for padding
    for chunk in corpus.lengths.argsort(stable=True).split(batch_size):
        width = int(corpus.lengths[chunk].max())
        value = record(model, corpus.tokens[chunk, :width].to(model.W_E.device), [hook], copy=False)[hook]
        total = total + value.flatten(2)[counts[chunk, :width].to(value.device)].double().sum(0)
    return total, int(counts.sum())
