"""Do two models' neurons mean the same tokens? A base model against a tuned one, layer by layer, and against chance.

Neuron n of one model is compared with neuron n of the other, so the two must share their shape and their tokens:

    same_top = share of neurons with the same first token
    jaccard  = mean over neurons of |A_n & B_n| / |A_n | B_n|        A_n, B_n: the top k tokens, as sets

Common tokens are on top of many neurons, so two unrelated models agree more often than one time in a vocabulary. Chance is
therefore measured: the same two numbers with the neurons of the second model permuted within their layer, matrix and pole.
"""

import numpy as np
import pandas as pd
from jaxtyping import Int

from interp.errors import OptionError
from interp.neurons.decode import COLUMNS

_GROUP = ["matrix", "layer", "pole"]
_KEY = [*_GROUP, "neuron"]
_MODEL = ("model", "revision", "screen")  # what may differ between two readings that are alike


def decoding_stability(
    table_a: pd.DataFrame, table_b: pd.DataFrame, *, n_permutations: int = 20, seed: int = 0
) -> pd.DataFrame:
    """How alike two tables of `decode_neurons` are, by matrix, layer and pole, with the level of chance beside it.

    n_permutations: of the second table's neurons, drawn by `seed`; chance is their mean.
    Columns: matrix, layer, pole, n (neurons), same_top, same_top_chance, jaccard, jaccard_chance (all shares, 0 to 1).
    Raises `OptionError` where the tables are of other neurons, were read otherwise or show other tokens by the same ids.
    """
    if n_permutations < 1:
        raise OptionError(f"cannot measure chance by {n_permutations} permutations")
    _check_alike(table_a, table_b)
    (keys, a), (other, b) = _top_ids(table_a), _top_ids(table_b)
    if a.shape != b.shape or not keys.equals(other):
        raise OptionError(
            f"the tables are of different neurons: {len(a)} poles with {a.shape[1]} tokens, and {len(b)} with {b.shape[1]}"
        )
    rng = np.random.default_rng(seed)
    rows = []
    for group, members in keys.groupby(_GROUP, sort=False, observed=True).indices.items():
        mine, theirs = a[members], b[members]
        chance = [_agreement(mine, rng.permutation(theirs)) for _ in range(n_permutations)]
        rows.append((*group, len(members), *_agreement(mine, theirs), *np.mean(chance, 0)))
    names = [*_GROUP, "n", "same_top", "jaccard", "same_top_chance", "jaccard_chance"]
    found = pd.DataFrame(rows, columns=names)
    return found[[*_GROUP, "n", "same_top", "same_top_chance", "jaccard", "jaccard_chance"]]


def _agreement(a: Int[np.ndarray, "neuron k"], b: Int[np.ndarray, "neuron k"]) -> tuple[float, float]:
    """(share with the same first token, mean Jaccard of the top k); |A | B| is 2k less what they share."""
    common = np.zeros(len(a), dtype=np.int64)
    for column in a.T:
        common += (b == column[:, None]).any(1)
    return float((a[:, 0] == b[:, 0]).mean()), float((common / (2 * a.shape[1] - common)).mean())


def _top_ids(table: pd.DataFrame) -> tuple[pd.DataFrame, Int[np.ndarray, "neuron k"]]:
    """Which neurons and poles, in one order for all tables; and the ids of their tokens by rank."""
    plain = table.assign(matrix=table["matrix"].astype(str), pole=table["pole"].astype(str))
    plain = plain.sort_values([*_KEY, "rank"], kind="stable", ignore_index=True)
    k = int(plain["rank"].max()) + 1
    if len(plain) % k or (plain["rank"].to_numpy() != np.tile(np.arange(k), len(plain) // k)).any():
        raise OptionError(f"the table lacks ranks: each neuron and pole has to have its first {k} tokens")
    return plain[_KEY].iloc[::k].reset_index(drop=True), plain["token_id"].to_numpy().reshape(-1, k)


def _check_alike(table_a: pd.DataFrame, table_b: pd.DataFrame) -> None:
    for table in (table_a, table_b):
        if missing := [name for name in COLUMNS if name not in table.columns]:
            raise OptionError(f"these are not decoded neurons: the table has no column {missing[0]!r}")
        if table.empty:
            raise OptionError("a table without neurons cannot be compared")
    first, second = (
        {name: value for name, value in table.attrs.get("reading", {}).items() if name not in _MODEL}
        for table in (table_a, table_b)
    )
    if wrong := [name for name in first.keys() & second.keys() if first[name] != second[name]]:
        name = min(wrong)
        raise OptionError(f"the tables were read in different ways: {name} is {first[name]} and {second[name]}")
    texts = [
        table.drop_duplicates("token_id").set_index("token_id")["token"].astype(str) for table in (table_a, table_b)
    ]
    a, b = texts[0].align(texts[1], join="inner")
    if (differ := a != b).any():
        token = int(a.index[differ][0])
        raise OptionError(f"token {token} is {a[token]!r} in one table and {b[token]!r} in the other: two vocabularies")
