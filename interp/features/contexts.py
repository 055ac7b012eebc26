"""Where latents fire most strongly: each latent's n best tokens of a text, with what stands around them.

A latent is read by its strongest contexts, at most one from each sequence (a latent that fires all along one text would otherwise
fill its list with it). One pass over the text keeps a running top n of every latent:

    best[s, i] = max over tokens t of sequence s of |f_i(t)|            ties: the first token
    top n of each latent over s                                        ties: the first sequence

Only latents whose n-th place a batch beats are looked at, and soon those are few. Strength is |f|, which is f but for
architectures that keep signs (abstopk). Where it fires is not what it means: weak activations may tell another story, so read
`density` (the share of tokens on which it fires) along with it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from interp.errors import LoadError, OptionError, SiteError
from interp.features.codes import Dictionary
from interp.features.sources import Corpus, ModelSource
from interp.files import check_writable, write_atomically
from interp.model.run import config_of
from interp.model.tokens import token_strings

COLUMNS = ("latent", "rank", "value", "sequence", "position", "token", "before", "after", "density")
_ENTRIES = 2**24  # of tokens x latents that are encoded at once
_ROW_GROUP = 2048  # rows of a file that are read together


@dataclass(frozen=True)
class _Firings:
    """Firings of the wanted latents in some sequences: one entry each, in the order of tokens."""

    column: Int[Tensor, " entry"]  # of the latent among those wanted
    value: Float[Tensor, " entry"]
    sequence: Int[Tensor, " entry"]
    position: Int[Tensor, " entry"]


@torch.no_grad()
def top_contexts(
    model, dictionary: Dictionary, corpus: Corpus, *, latents: Sequence[int] | None = None, n: int = 20,
    window: tuple[int, int] = (10, 5), batch_size: int = 32, progress: bool = False,
) -> pd.DataFrame:  # fmt: skip
    """The n strongest contexts of each latent, at most one per sequence; first positions do not count.

    dictionary: an SAE, or what else gives codes at a hook, such as an SNMF, whose features are the latents here. latents: default
    all. window: tokens shown before and after. batch_size: sequences per forward pass. A transcoder is read where it reads.
    Columns: latent, rank (0: the strongest), value (the code), sequence, position, token, before, after (texts),
    density (firings / tokens, of the whole corpus). A latent that never fires has no row.
    Raises `SiteError` where the dictionary names no hook, the model has no such hook, or it has no such latent.
    """
    if n < 1:
        raise OptionError(f"cannot keep {n} contexts of a latent")
    if min(window) < 0:
        raise OptionError(f"a window is a number of tokens before and one after, not {window}")
    hook, n_latents, kind = dictionary.hook, dictionary.n_features, type(dictionary).__name__
    if hook is None:
        raise SiteError(f"this {kind} does not say which hook it belongs to, so it is not known what to read")
    if hook not in model.hook_dict:
        raise SiteError(f"{config_of(model).name} has no hook point {hook!r}")
    wanted = (
        torch.arange(n_latents)
        if latents is None
        else torch.tensor([*dict.fromkeys(map(int, latents))], dtype=torch.int64)
    )
    if wrong := wanted[(wanted < 0) | (wanted >= n_latents)].tolist():
        raise SiteError(f"the {kind} has latents 0 to {n_latents - 1}, not {wrong[0]}")
    source = ModelSource(model, corpus, [hook], batch_size=batch_size)
    best = _Best(len(wanted), n, dictionary.device, dictionary.dtype)
    fired, tokens = torch.zeros(len(wanted), dtype=torch.int64, device=dictionary.device), 0
    with tqdm(total=source.n_sequences, desc="contexts", unit="seq", disable=not progress) as bar:
        for start in range(0, source.n_sequences, batch_size):
            sequences = range(start, min(start + batch_size, source.n_sequences))
            rows = source.read(sequences)
            tokens += len(rows.ids)
            found = [*_firings(dictionary, rows.values[hook], rows.ids, wanted)]
            for part in found:
                fired += torch.bincount(part.column, minlength=len(wanted))
            best.add(found, sequences)
            bar.update(len(sequences))
    return _table(model, corpus, best, wanted, fired.cpu() / max(tokens, 1), window)


def _firings(
    dictionary: Dictionary, x: Float[Tensor, "token d_in"], ids: Int[Tensor, "token 2"], wanted: Int[Tensor, " wanted"]
) -> Iterator[_Firings]:
    """Entries of the code that are not 0, some tokens at a time: pre-activations of a whole batch may not fit."""
    n_latents, device = dictionary.n_features, dictionary.device
    column = torch.full((n_latents,), -1, device=device)
    column[wanted.to(device)] = torch.arange(len(wanted), device=device)
    size = max(1, _ENTRIES // n_latents)
    for rows, where in zip(x.split(size), ids.to(device).split(size), strict=True):
        codes = dictionary.codes(rows.to(device, dictionary.dtype))
        kept = ((codes.values != 0) & (column[codes.latents] >= 0)).nonzero()[:, 0]
        sequence, position = where[codes.rows[kept]].unbind(1)
        yield _Firings(column[codes.latents[kept]], codes.values[kept], sequence, position)


class _Best:
    """The running top n: value, sequence and position of each latent's places, strongest first; sequence -1 where none is."""

    def __init__(self, n_latents: int, n: int, device: torch.device, dtype: torch.dtype):
        self.value = torch.zeros(n_latents, n, device=device, dtype=dtype)
        self.sequence = torch.full((n_latents, n), -1, device=device)
        self.position = torch.full((n_latents, n), -1, device=device)

    def add(self, found: list[_Firings], sequences: range) -> None:
        """Take in all firings of some sequences, which come after all that were taken in before."""
        n_latents, n = self.value.shape
        column, value, sequence, position = (
            torch.cat([getattr(part, name) for part in found]) for name in ("column", "value", "sequence", "position")
        )
        # the strongest token of each (latent, sequence), and of equally strong ones the first
        place, size = column * len(sequences) + (sequence - sequences.start), value.abs()
        strongest = size.new_zeros(n_latents * len(sequences)).scatter_reduce_(0, place, size, "amax")
        entry = torch.arange(len(place), device=place.device)
        level = size == strongest[place]
        first = place.new_full((n_latents * len(sequences),), len(place))
        first.scatter_reduce_(0, place[level], entry[level], "amin")
        shape = (n_latents, len(sequences))
        strongest, first = strongest.unflatten(0, shape), first.unflatten(0, shape)
        # a tie with the n-th place changes nothing: what is there came first
        better = (strongest.amax(1) > self.value[:, -1].abs()).nonzero()[:, 0]
        first = first[better]
        there, first = first < len(place), first.clamp_max(max(len(place) - 1, 0))
        merged = [
            torch.cat([getattr(self, name)[better], torch.where(there, new[first], empty)], 1)
            for name, new, empty in (("value", value, 0), ("sequence", sequence, -1), ("position", position, -1))
        ]
        order = merged[0].abs().sort(dim=1, descending=True, stable=True).indices[:, :n]
        self.value[better], self.sequence[better], self.position[better] = (side.gather(1, order) for side in merged)


def _table(
    model, corpus: Corpus, best: _Best, wanted: Tensor, density: Float[Tensor, " wanted"], window: tuple[int, int]
) -> pd.DataFrame:
    there = (best.sequence >= 0).cpu()
    row, rank = there.nonzero().unbind(1)
    value, sequence, position = (side.cpu()[there] for side in (best.value, best.sequence, best.position))
    texts = _Texts(model.tokenizer, corpus)
    before, after = window
    places = [*zip(sequence.tolist(), position.tolist(), strict=True)]
    columns = {
        "latent": wanted[row].numpy(),
        "rank": rank.numpy(),
        "value": value.float().numpy(),
        "sequence": sequence.numpy(),
        "position": position.numpy(),
        "token": texts.of([(s, t, t + 1) for s, t in places]),
        "before": texts.of([(s, max(0, t - before), t) for s, t in places]),
        "after": texts.of([(s, t + 1, t + 1 + after) for s, t in places]),
        "density": density[row].numpy(),
    }
    return pd.DataFrame(columns)


class _Texts:
    """Texts of stretches of a corpus: token by token from one table, so that millions of them need no million decodings."""

    def __init__(self, tokenizer, corpus: Corpus):
        self.tokenizer = tokenizer
        self.tokens, self.lengths = corpus.tokens.cpu().numpy(), corpus.lengths.cpu().numpy()
        self.strings: dict[int, str] = {}

    def of(self, stretches: list[tuple[int, int, int]]) -> np.ndarray:
        """Texts of tokens start:stop of a sequence, as far as it goes."""
        ids = [self.tokens[s, start : min(stop, self.lengths[s])].tolist() for s, start, stop in stretches]
        missing = sorted({i for row in ids for i in row} - self.strings.keys())
        self.strings |= zip(missing, token_strings(self.tokenizer, missing), strict=True)
        texts = np.empty(len(ids), dtype=object)
        texts[:] = [self._joined(row) for row in ids]
        return texts

    def _joined(self, ids: list[int]) -> str:
        text = "".join(self.strings[i] for i in ids)
        if "\ufffd" not in text or len(ids) < 2:
            return text
        # characters of several tokens, which only exist together; a decoder may drop the space in front
        whole = self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return " " + whole if text.startswith(" ") and not whole.startswith(" ") else whole


# ----------------------------------------------------------------------------------------------------------------- files


def save_contexts(table: pd.DataFrame, path: str | Path) -> Path:
    """Write contexts to a .parquet file sorted by latent, in row groups so small that one latent is found at once.

    Raises `OptionError` where the file cannot be written or is to be named otherwise.
    """
    path = check_writable(path)
    if path.suffix != ".parquet":
        raise OptionError(f"contexts are written as .parquet, not {path.suffix or 'without an ending'}")
    if missing := [name for name in COLUMNS if name not in table.columns]:
        raise OptionError(f"these are not contexts: the table has no column {missing[0]!r}")
    content = BytesIO()
    table.sort_values(["latent", "rank"], kind="stable").to_parquet(content, index=False, row_group_size=_ROW_GROUP)
    return write_atomically(path, content.getvalue())


def load_contexts(path: str | Path, *, latents: Sequence[int] | None = None) -> pd.DataFrame:
    """The contexts of a file of `save_contexts`, sorted by latent and rank; of some latents, only their rows are read.

    Raises `LoadError` where the file is not there or holds something else.
    """
    import pyarrow
    import pyarrow.parquet as parquet

    path = Path(path)
    if not path.is_file():
        raise LoadError(f"there is no file {path}")
    filters = None if latents is None else [("latent", "in", [int(latent) for latent in latents])]
    try:
        table = parquet.read_table(path, columns=list(COLUMNS), filters=filters).to_pandas()
    except pyarrow.ArrowException as error:
        raise LoadError(f"{path} holds no contexts: {str(error).splitlines()[0]}") from None
    if list(table.columns) != list(COLUMNS):
        raise LoadError(f"{path} holds no contexts: it has only the columns {', '.join(map(str, table.columns))}")
    return table
