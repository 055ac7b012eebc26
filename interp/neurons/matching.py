"""Which neuron of one model is which of another: both are read by what they say of the same vocabulary.

Neurons of two models live in streams that have no basis in common, but each has a projection to the tokens of its own model, and
the tokens are the same (Dar et al., arXiv 2209.02535, section 5). With w_i a neuron's weight in the stream of a model, and
E [d_vocab, d_model] that model's direction for every token,

    corr_ij = corr( E_a w_i, E_b w_j ) = w_i . C_ab w_j / sqrt( (w_i . C_aa w_i) (w_j . C_bb w_j) )
    C_ab = E_a^T E_b / V - m_a m_b^T

so nothing as wide as the vocabulary is kept per neuron. One neuron to one by the Hungarian method on |corr|. An orthogonal change
of one model's basis changes nothing. Correlations over tens of thousands of tokens that share structure (frequency, language)
are far from 0 by themselves, and the best of thousands is larger still: `layer_similarity` gives what a shuffled vocabulary
gives, which is a floor for the second effect and not for the first.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from interp.errors import OptionError, SiteError, one_of
from interp.model.folding import behind, reads
from interp.model.run import canonical
from interp.model.transformer import Transformer
from interp.neurons.vocabulary import (
    EMBEDDINGS,
    correlation_through,
    seen_by_tokens,
    token_table,
    vocabulary_covariance,
)

MATRICES = ("down", "up", "gate")


@torch.no_grad()
def match_neurons(
    model_a: Transformer, model_b: Transformer, *, layers: Sequence[tuple[int, int]] | None = None,
    matrix: Literal["down", "up", "gate"] = "down", signed: bool = False, fold_norm: bool = True,
    embedding: Literal["unembed", "embed"] = "unembed",
) -> pd.DataFrame:  # fmt: skip
    """Each neuron of one model with one of another: the assignment within each pair of layers with the largest sum of |corr|.

    layers: pairs (layer of a, layer of b); default each layer with the same of the other. matrix: "down" what neurons write, "up"
    (the up-projection of a gated MLP) or "gate" what they read. signed: the largest sum of corr: opposite neurons do not match.
    fold_norm, embedding: as in `interp.neurons.vocabulary`, both models alike.
    Columns: layer_a, neuron_a, layer_b, neuron_b, correlation (signed). Where one layer is wider, neurons of it are left over;
    neurons whose projection is the same for every token have no correlation, are matched last, and say NaN.
    The assignment is cubic in d_mlp: seconds at 3,072, minutes at 14,336, and d_mlp^2 numbers of 8 bytes.
    Raises `OptionError` where vocabularies differ, or layers are not named for models of different depth, `SiteError` for a layer
    that is not there or a gate that there is none of.
    """
    both = _both(model_a, model_b, "match_neurons", matrix, embedding)
    if layers is None:
        depths = [model.cfg.n_layers for model in both]
        if depths[0] != depths[1]:
            raise OptionError(
                f"models of {depths[0]} and {depths[1]} layers have no obvious pairs: name them in layers"
            )
        layers = [(layer, layer) for layer in range(depths[0])]
    covariances = _covariances(*both, embedding)
    tables = []
    for pair in layers:
        rows = [_neurons(model, layer, matrix, fold_norm, embedding) for model, layer in zip(both, pair, strict=True)]
        correlation = _correlation(*rows, covariances)
        gain = np.nan_to_num(correlation if signed else np.abs(correlation), nan=-2.0)
        a, b = linear_sum_assignment(gain, maximize=True)
        about = {"layer_a": pair[0], "neuron_a": a, "layer_b": pair[1], "neuron_b": b}
        tables.append(pd.DataFrame({**about, "correlation": correlation[a, b]}))
    if not tables:
        raise OptionError("there are no pairs of layers to match")
    return pd.concat(tables, ignore_index=True)


@torch.no_grad()
def layer_similarity(
    model_a: Transformer, model_b: Transformer, *, matrix: Literal["down", "up", "gate"] = "down", fold_norm: bool = True,
    embedding: Literal["unembed", "embed"] = "unembed", seed: int = 0,
) -> pd.DataFrame:  # fmt: skip
    """How well neurons of each layer of a have a likeness in each layer of b: mean over neurons of a of the largest |corr| in b.

    Columns: layer_a, layer_b, similarity (0 to 1), null (the same with the tokens of b shuffled by `seed`: what the best of as
    many unrelated neurons gives). Neurons without a correlation (see `match_neurons`) are left out of the mean.
    Raises `OptionError` where vocabularies differ, `SiteError` for a gate that there is none of.
    """
    both = _both(model_a, model_b, "layer_similarity", matrix, embedding)
    covariances = _covariances(*both, embedding)
    generator = torch.Generator().manual_seed(seed)
    shuffle = torch.randperm(both[1].cfg.d_vocab, generator=generator).to(both[1].device)
    tables = token_table(both[0], embedding), token_table(both[1], embedding)[shuffle].to(both[0].device)
    shuffled = (vocabulary_covariance(*tables), *covariances[1:])
    rows = [[_neurons(m, layer, matrix, fold_norm, embedding) for layer in range(m.cfg.n_layers)] for m in both]
    entries = []
    for layer_a, a in enumerate(rows[0]):
        for layer_b, b in enumerate(rows[1]):
            found = [_mean_best(_correlation(a, b, through)) for through in (covariances, shuffled)]
            entries.append((layer_a, layer_b, *found))
    return pd.DataFrame(entries, columns=["layer_a", "layer_b", "similarity", "null"])


@torch.no_grad()
def stitch(
    model_a: Transformer, model_b: Transformer, *, fold_norm: bool = True,
    embedding: Literal["unembed", "embed"] = "unembed",
) -> Float[Tensor, "d_a d_b"]:  # fmt: skip
    """The map from the stream of a to that of b that keeps what states say of the vocabulary, in float64.

        S = argmin || E_b S^T - E_a ||  over all tokens, up to a constant that no softmax sees:  S^T = C_bb^+ C_ba

    A state h of a (row) is h @ S in b: under b it has the logits, before norms' scales, that h has under a, as far as d_b
    channels can hold them. Equal to E_a E_b^-1 of the paper (its E is [d_model, d_vocab]). Raises as `match_neurons` does.
    """
    both = _both(model_a, model_b, "stitch", "down", embedding)
    cross, _, own_b = _covariances(*both, embedding)
    # the final norm belongs to the directions of tokens: rows of these are what it makes of each channel of the stream
    a, b = (
        seen_by_tokens(m, torch.eye(m.cfg.d_model, dtype=cross.dtype, device=m.device), embedding, fold_norm=fold_norm)
        for m in both
    )
    a, b = a.to(cross), b.to(cross)
    return a @ cross @ b.T @ torch.linalg.pinv(b @ own_b @ b.T, hermitian=True)


def _both(
    model_a: Transformer, model_b: Transformer, what: str, matrix: str, embedding: str
) -> tuple[Transformer, ...]:
    one_of(matrix, MATRICES, "matrix of neurons")
    one_of(embedding, EMBEDDINGS, "token embedding")
    for model in (model_a, model_b):
        canonical(model, what)
    a, b = model_a.cfg, model_b.cfg
    if a.d_vocab != b.d_vocab:
        raise OptionError(
            f"{a.name} has a vocabulary of {a.d_vocab} tokens and {b.name} one of {b.d_vocab}: only neurons that speak of the "
            "same tokens can be matched"
        )
    if model_a.tokenizer is not None and model_b.tokenizer is not None:
        ids, others = model_a.tokenizer.get_vocab(), model_b.tokenizer.get_vocab()
        if ids != others:
            token = min(set(ids.items()) ^ set(others.items()), key=lambda entry: (entry[1], entry[0]))[1]
            raise OptionError(
                f"token {token} is not the same in {a.name} and {b.name}, so their neurons cannot be matched"
            )
    return model_a, model_b


def _covariances(a: Transformer, b: Transformer, embedding: str) -> tuple[Tensor, Tensor, Tensor]:
    """C_ab, C_aa and C_bb, where a is."""
    tables = token_table(a, embedding), token_table(b, embedding).to(a.device)
    return vocabulary_covariance(*tables), *(vocabulary_covariance(table) for table in tables)


def _neurons(
    model: Transformer, layer: int, matrix: str, fold_norm: bool, embedding: str
) -> Float[Tensor, "neuron d_model"]:
    """Neurons' weights as directions that `token_table` projects to the vocabulary."""
    cfg = model.cfg
    if not 0 <= layer < cfg.n_layers:
        raise SiteError(f"{cfg.name} has layers 0 to {cfg.n_layers - 1}, not {layer}")
    block = model.blocks[layer]
    if matrix == "gate" and not cfg.gated:
        raise SiteError(f"the MLPs of {cfg.name} have no gate")
    if matrix == "down":
        rows = behind(block.ln2_post if fold_norm and cfg.post_norm else None, block.mlp.W_out)
    else:
        norm = (block.ln1 if cfg.shared_norm else block.ln2) if fold_norm and cfg.pre_norm else None
        rows = reads(norm, (block.mlp.W_in if matrix == "up" else block.mlp.W_gate).T)
    return seen_by_tokens(model, rows, embedding, fold_norm=fold_norm)


def _correlation(a: Tensor, b: Tensor, covariances: tuple[Tensor, Tensor, Tensor]) -> Float[np.ndarray, "n m"]:
    return correlation_through(a, b, *covariances).cpu().numpy()


def _mean_best(correlation: Float[np.ndarray, "n m"]) -> float:
    size = np.abs(correlation)
    size = size[~np.isnan(size).all(1)]
    return float(np.nanmax(size, axis=1).mean()) if len(size) else float("nan")
