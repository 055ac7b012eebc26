"""Every neuron's weights as tokens: the k whose vectors its row agrees with most (pole +) and is most against (pole -).

For each neuron with row w_n (`interp.neurons.readings` says which) and each token with vector u_t,

    pole +: the k largest w_n . u_t over t        pole -: the k largest -(w_n . u_t)        ties: the lowest token id

exactly, in one streamed product that never holds neurons x vocabulary. What the tokens of an up row say is what the neuron looks
for, those of a down row what it promotes when it fires positively; neither says that the neuron does this in any text, which
`interp.neurons.clamp` tests. Kurtosis of a neuron's scores over the whole vocabulary (less a normal distribution's 3) is high
where a few tokens stand out, and so tells neurons about something from neurons about nothing in particular:

    kurtosis_n = m_4 / m_2^2 - 3        m_i: the i-th central moment of w_n . u_t over t
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from interp.errors import OptionError, SiteError, one_of
from interp.model.run import canonical
from interp.model.tokens import token_strings
from interp.model.transformer import Transformer
from interp.neurons.readings import Reading, reading_rows, token_deviations, vocabulary_rows
from interp.neurons.screen import top_tokens

COLUMNS = ("matrix", "layer", "neuron", "pole", "rank", "token_id", "token", "score")
POLES = {"both": ("+", "-"), "+": ("+",), "-": ("-",)}
SCREENS = {"bfloat16": torch.bfloat16}


@torch.no_grad()
def decode_neurons(
    model: Transformer, *, matrix: str | Sequence[str] = "up", layers: Sequence[int] | None = None,
    neurons: Sequence[int] | None = None, k: int = 10, poles: Literal["both", "+", "-"] = "both", kurtosis: bool = False,
    score: str = "cosine", fold_norm: bool = True, center_rows: bool | None = None, final_norm: str | None = None,
    vocabulary: str = "unembed", center: bool = False, screen: Literal["bfloat16"] | None = None, progress: bool = False,
) -> pd.DataFrame:  # fmt: skip
    """The k tokens of each pole of each neuron, by its weights alone.

    matrix: "up", "gate", "down", "gate+up" (read only as pole +), "gate-up" (only as pole -), or several of them.
    layers, neurons (of each of these layers): default all. score ... center: see `interp.neurons.readings`.
    screen: look for candidates in bfloat16 first; the result is the same.
    Columns: matrix, layer, neuron, pole, rank (0: the first), token_id, token (text), score (for pole -: of minus the row);
    with `kurtosis` that of the neuron. `.attrs["reading"]`: the options as they were decided, model and revision.
    Raises `SiteError` where the model has no such layer or neuron, `OptionError` for options that it cannot follow.
    """
    canonical(model, "decode_neurons")
    cfg, signs = model.cfg, POLES[one_of(poles, POLES, "choice of poles")]
    dtype = None if screen is None else SCREENS[one_of(screen, SCREENS, "dtype to screen tokens in")]
    if not 1 <= k <= cfg.d_vocab:
        raise OptionError(f"cannot show {k} of {cfg.d_vocab} tokens")
    layers = _chosen(layers, cfg.n_layers, f"{cfg.name} has layers")
    neurons = _chosen(neurons, cfg.d_mlp, f"layers of {cfg.name} have neurons")
    names = [matrix] if isinstance(matrix, str) else list(dict.fromkeys(matrix))
    if not (names and layers and neurons):
        raise OptionError("there is nothing to decode: no matrix, no layer or no neuron is chosen")
    options = (fold_norm, center_rows, final_norm, score, vocabulary, center)
    readings = [Reading(name, *options).of(model) for name in names]
    if wrong := [reading for reading in readings if not set(signs) & set(reading.poles)]:
        raise OptionError(f"{wrong[0].matrix} is read as pole {wrong[0].poles[0]} only, not as pole {poles}")
    blocks = []
    with tqdm(total=len(readings) * len(layers), desc="neurons", unit="layer", disable=not progress) as bar:
        for reading in readings:
            tokens = vocabulary_rows(model, reading)
            for layer in layers:
                rows = reading_rows(model, layer, reading)
                weight = tokens / _divisor(token_deviations(rows, tokens))[:, None] if score == "zscore" else tokens
                rows = rows[torch.tensor(neurons, device=rows.device)] if len(neurons) < cfg.d_mlp else rows
                shown = tuple(sign for sign in signs if sign in reading.poles)
                blocks.append(_decoded(reading, layer, shown, rows, weight, k, kurtosis, dtype))
                bar.update()
    table = _table(model, blocks, neurons, k)
    table.attrs["reading"] = {
        "model": cfg.name, "revision": cfg.revision or "local", "d_vocab": cfg.d_vocab, "poles": poles, "k": k,
        "screen": screen, "matrices": {reading.matrix: reading.to_dict() for reading in readings},
    }  # fmt: skip
    return table


@dataclass(frozen=True)
class _Block:
    """What was found for one layer of one matrix."""

    matrix: str
    layer: int
    poles: tuple[str, ...]
    values: Float[np.ndarray, "neuron pole k"]
    ids: Int[np.ndarray, "neuron pole k"]
    kurtosis: Float[np.ndarray, " neuron"] | None


def _decoded(
    reading: Reading, layer: int, poles: tuple[str, ...], rows: Float[Tensor, "neuron d"],
    weight: Float[Tensor, "vocabulary d"], k: int, kurtosis: bool, screen: torch.dtype | None,
) -> _Block:  # fmt: skip
    # a joint reading's one pole is the top of its own rows, whatever sign of the neuron it stands for
    flip = poles == ("-",) and reading.poles != ("-",)
    found = top_tokens(-rows if flip else rows, weight, k, both=len(poles) == 2, moments=kurtosis, screen=screen)
    values, ids = (side.transpose(0, 1).cpu().numpy() for side in (found.values, found.ids))
    spread = excess_kurtosis(found.moments, len(weight)).cpu().numpy() if kurtosis else None
    return _Block(reading.matrix, layer, poles, values, ids, spread)


def excess_kurtosis(moments: Float[Tensor, "row 4"], n: int) -> Float[Tensor, " row"]:
    """m_4 / m_2^2 - 3 of n numbers from the sums of their first four powers, in float64; NaN where they are all alike.

    m_2 = s_2 - s_1^2, m_4 = s_4 - 4 s_1 s_3 + 6 s_1^2 s_2 - 3 s_1^4, s_i the mean of the i-th powers.
    """
    s1, s2, s3, s4 = (moments.double() / n).unbind(1)
    m2 = s2 - s1**2
    m4 = s4 - 4 * s1 * s3 + 6 * s1**2 * s2 - 3 * s1**4
    # below the rounding of the powers' sums there is no spread to speak of
    return torch.where(m2 > 1e-12 * s2, m4 / m2**2 - 3, torch.nan)


def _divisor(deviation: Float[Tensor, " vocabulary"]) -> Float[Tensor, " vocabulary"]:
    """Deviations to divide by; a token that all neurons score alike scores 0 with every neuron."""
    return torch.where(deviation > 0, deviation, torch.inf)


def _table(model: Transformer, blocks: list[_Block], neurons: list[int], k: int) -> pd.DataFrame:
    """All blocks one after another, without a step per row."""
    sizes = [block.ids.size for block in blocks]
    matrices, signs = list(dict.fromkeys(block.matrix for block in blocks)), ["+", "-"]
    ids = np.concatenate([block.ids.reshape(-1) for block in blocks])

    def by_block(values: list[int], dtype: type) -> np.ndarray:
        return np.repeat(np.array(values, dtype=dtype), sizes)

    def by_neuron(values: list[np.ndarray]) -> np.ndarray:
        return np.concatenate([np.repeat(v, len(b.poles) * k) for v, b in zip(values, blocks, strict=True)])

    sides = [np.repeat(np.array([signs.index(sign) for sign in block.poles], np.int8), k) for block in blocks]
    columns = {
        "matrix": pd.Categorical.from_codes(by_block([matrices.index(b.matrix) for b in blocks], np.int8), matrices),
        "layer": by_block([block.layer for block in blocks], np.int32),
        "neuron": by_neuron([np.array(neurons, dtype=np.int32)] * len(blocks)),
        "pole": pd.Categorical.from_codes(np.concatenate([np.tile(side, len(neurons)) for side in sides]), signs),
        "rank": np.tile(np.arange(k, dtype=np.int32), len(ids) // k),
        "token_id": ids.astype(np.int32),
        "token": token_column(model, ids),
        "score": np.concatenate([block.values.reshape(-1) for block in blocks]),
    }
    if blocks[0].kurtosis is not None:
        columns["kurtosis"] = by_neuron([block.kurtosis for block in blocks])
    return pd.DataFrame(columns)


def token_column(model: Transformer, ids: Int[np.ndarray, " row"]) -> pd.Categorical:
    """Texts of token ids as one categorical column: each text is made once, and two ids may share one."""
    present, place = np.unique(ids, return_inverse=True)
    texts = np.array(token_strings(model.tokenizer, present.tolist()), dtype=object)
    texts, code = np.unique(texts, return_inverse=True)
    return pd.Categorical.from_codes(code[place].astype(np.int32), texts.tolist())


def _chosen(wanted: Sequence[int] | None, n: int, what: str) -> list[int]:
    chosen = list(range(n)) if wanted is None else [*dict.fromkeys(map(int, wanted))]
    if wrong := [one for one in chosen if not 0 <= one < n]:
        raise SiteError(f"{what} 0 to {n - 1}, not {wrong[0]}")
    return chosen
