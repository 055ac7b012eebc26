"""`interp neurons`: read neurons' weights as tokens, search them by token, hold neurons at a value.

interp neurons decode --matrix up down --out neurons.parquet
interp neurons find " dog" neurons.parquet --matrix down
interp neurons clamp --neuron m2.n17 --value 5 --prompt "Anna went to the"
"""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """The model, and how its neurons are read as tokens."""

    model: str = "mini-gpt2"
    """Bundled model, folder in Hugging Face's layout, or hub name."""
    matrix: tuple[Literal["up", "gate", "down", "gate+up", "gate-up"], ...] = ("up",)
    """up, gate: what neurons read. down: what they write. gate+up, gate-up: what a gated one fires positively, negatively on."""
    layers: tuple[int, ...] = ()
    """Default: all."""
    k: int = 10
    """Tokens of each neuron and pole."""
    poles: Literal["both", "+", "-"] = "both"
    """Tokens that the row agrees with, those that it is against, or both."""
    score: Literal["cosine", "logit", "zscore"] = "cosine"
    """zscore: against the layer's other neurons. Logits of different neurons do not compare."""
    fold_norm: bool = True
    """Make the gain of the norm beside the MLP part of the rows."""
    final_norm: Literal["none", "unit", "full"] | None = None
    """The model's last norm on the rows (default: full for down, none for what is read)."""
    vocabulary: Literal["unembed", "embed"] = "unembed"
    """Tokens' vectors: columns of the unembedding, or rows of the embedding."""
    center: bool = False
    """Take the mean off tokens' vectors."""
    screen: Literal["bfloat16"] | None = None
    """Look for candidates in bfloat16 first; the result is the same."""
    device: str | None = None
    """Default: torch's default device."""
    dtype: str | None = None
    """Default: the checkpoint's."""
    quiet: bool = False
    """No progress bars."""

    def decode(self, *, kurtosis: bool = False) -> "pd.DataFrame":
        """The table of `decode_neurons`. What needs no model is checked before one is loaded."""
        from interp.errors import OptionError

        if self.k < 1:
            raise OptionError(f"cannot show {self.k} tokens of a neuron")
        if not self.matrix:
            raise OptionError("--matrix names no matrix")
        from interp.model.load import load_model
        from interp.neurons.decode import decode_neurons

        model = load_model(self.model, device=self.device, dtype=self.dtype)
        return decode_neurons(
            model, matrix=self.matrix, layers=self.layers or None, k=self.k, poles=self.poles, kurtosis=kurtosis,
            score=self.score, fold_norm=self.fold_norm, final_norm=self.final_norm, vocabulary=self.vocabulary,
            center=self.center, screen=self.screen, progress=not self.quiet,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DecodeNeurons(Decoding):
    """Read every neuron's weights as tokens; print the most specialised neurons, write all."""

    out: Path | None = None
    """Write the table to this .parquet file."""
    show: int = 12
    """Neurons to print: those of the highest kurtosis of scores over the vocabulary."""

    def run(self) -> None:
        from interp.errors import OptionError

        if self.show < 0:
            raise OptionError(f"cannot print {self.show} neurons")
        if self.out is not None:
            from interp.neurons.table import check_neurons_path

            check_neurons_path(self.out)
        table = self.decode(kurtosis=True)
        if self.out is not None:
            from interp.neurons.table import save_neurons

            save_neurons(table, self.out)  # before anything is printed: a closed pipe must not cost the result
        print(_most_specialised(table, self.show))
        if self.out is not None:
            print(f"\nneurons: {self.out.resolve()}")


@dataclass(frozen=True, kw_only=True)
class FindNeurons(Decoding):
    """Which neurons are about a token? Of a file of `interp neurons decode`, or of a model that is decoded for it."""

    token: Annotated[str, tyro.conf.Positional]
    """The token's text, exactly: " dog" and "dog" are two tokens."""
    file: Annotated[Path | None, tyro.conf.Positional] = None
    """Of `interp neurons decode`; default: decode --model now. What is shown of it is chosen by --matrix and --poles."""
    matrix: tuple[Literal["up", "gate", "down", "gate+up", "gate-up"], ...] = ()
    """Default: all that the file has; of a model, up and down."""
    max_rank: int | None = None
    """Only where it is among a neuron's tokens up to this rank (0: the first)."""
    show: int = 20
    """Neurons to print."""

    def run(self) -> None:
        from interp.errors import OptionError

        if self.show < 1:
            raise OptionError(f"cannot print {self.show} neurons")
        if self.max_rank is not None and self.max_rank < 0:
            raise OptionError(f"ranks begin at 0, not at {self.max_rank}")
        import pandas as pd

        from interp.neurons.table import find_neurons

        table = self._file() if self.file is not None else replace(self, matrix=self.matrix or ("up", "down")).decode()
        pole = None if self.poles == "both" else self.poles
        parts = [
            find_neurons(table, self.token, matrix=matrix, pole=pole, max_rank=self.max_rank, k=self.show)
            for matrix in self.matrix or (None,)
        ]
        found = pd.concat(parts).sort_values("score", ascending=False, kind="stable").head(self.show)
        if found.empty:
            print(f"{self.token!r} is a top token of some neuron, but of none that was asked for")
            return
        found = found.assign(neuron=[f"m{row.layer}.n{row.neuron}" for row in found.itertuples()])
        found = found[["neuron", "matrix", "pole", "rank", "score"]]
        print(found.to_string(index=False, float_format="{:+.3f}".format))

    def _file(self) -> Path:
        """The file, if no option is given that only decoding has."""
        from interp.errors import OptionError

        searching = {"token", "file", "matrix", "poles", "max_rank", "show", "quiet"}
        for option in fields(self):
            if option.name not in searching and getattr(self, option.name) != option.default:
                flag = f"--{option.name.replace('_', '-')}"
                raise OptionError(f"{flag} is for decoding a model, and {self.file} is decoded already")
        return self.file


@dataclass(frozen=True, kw_only=True)
class ClampNeurons:
    """Hold neurons at a value; print the tokens whose probability of coming next changes most."""

    neuron: tuple[str, ...]
    """As m2.n17, one or several."""
    value: tuple[float, ...]
    """What each is held at; one value for all, or one for each."""
    prompt: tuple[str, ...]
    """One or several texts."""
    model: str = "mini-gpt2"
    """Bundled model, folder in Hugging Face's layout, or hub name."""
    site: Literal["post", "up", "gate"] = "post"
    """post: the neuron's output. up, gate: before the product of a gated neuron."""
    positions: tuple[int, ...] = ()
    """Tokens to clamp at, the first being 0 (default: all)."""
    k: int = 10
    """Tokens to print for each prompt."""
    out: Path | None = None
    """Write them to this .csv or .parquet file."""
    device: str | None = None
    """Default: torch's default device."""
    dtype: str | None = None
    """Default: the checkpoint's."""

    def run(self) -> None:
        from interp.errors import OptionError
        from interp.files import check_writable, write_atomically

        if self.out is not None and check_writable(self.out).suffix not in (".csv", ".parquet"):
            raise OptionError(f"cannot write {self.out.suffix or 'a file without an ending'}: use .csv or .parquet")
        values = self.values()
        from interp.model.load import load_model
        from interp.neurons.clamp import clamp_effect

        model = load_model(self.model, device=self.device, dtype=self.dtype)
        table = clamp_effect(
            model, self.prompt, values, site=self.site, positions=list(self.positions) or "all", k=self.k
        )
        if self.out is not None:
            csv = self.out.suffix == ".csv"
            write_atomically(self.out, table.to_csv(index=False) if csv else table.to_parquet(index=False))
        for number, rows in table.groupby("prompt"):
            print(f"{_line(self.prompt[number])}")
            for row in rows.itertuples():
                print(f"  {row.token!r:16} {row.before:8.5f} -> {row.after:8.5f}  {row.difference:+.5f}")
            print()
        if self.out is not None:
            print(f"changes: {self.out.resolve()}")

    def values(self) -> dict[tuple[int, int], float]:
        """(layer, neuron): value, checked before a model is loaded."""
        from interp.errors import OptionError, SiteError
        from interp.sites import parse_node

        if len(self.value) not in (1, len(self.neuron)):
            raise OptionError(
                f"there are {len(self.value)} values for {len(self.neuron)} neurons: give one, or one for each"
            )
        if not (self.neuron and self.prompt):
            raise OptionError("give at least one --neuron and one --prompt")
        nodes = [parse_node(text) for text in self.neuron]
        if wrong := [text for text, node in zip(self.neuron, nodes, strict=True) if node.kind != "neuron"]:
            raise SiteError(f"{wrong[0]!r} is not a neuron: write m2.n17")
        if len(set(nodes)) < len(nodes):
            raise OptionError(f"a neuron is named twice in {', '.join(self.neuron)}")
        values = self.value * (len(nodes) if len(self.value) == 1 else 1)
        return {(node.layer, node.index): value for node, value in zip(nodes, values, strict=True)}


def _most_specialised(table: "pd.DataFrame", n: int) -> str:
    """The n neurons of the highest kurtosis, with the first tokens of each pole, as text."""
    of = ["matrix", "layer", "neuron"]
    first = table[table["rank"] < 4]
    best = first.drop_duplicates(of).sort_values("kurtosis", ascending=False, kind="stable").head(n)
    lines = [f"{table.attrs['reading']['model']}: {len(table.drop_duplicates(of))} neurons; the most specialised:"]
    for row in best.itertuples():
        mine = first[(first["matrix"] == row.matrix) & (first["layer"] == row.layer) & (first["neuron"] == row.neuron)]
        lines.append(f"m{row.layer}.n{row.neuron} {row.matrix}, kurtosis {row.kurtosis:.1f}")
        for pole, rows in mine.groupby("pole", observed=True):
            tokens = (f"{t.token!r} {t.score:+.2f}" for t in rows.itertuples())
            lines.append(f"  {pole} {'  '.join(tokens)}")
    return "\n".join(lines)


def _line(text: str) -> str:
    return text.replace("\n", "\\n")


Command = (
    Annotated[DecodeNeurons, tyro.conf.subcommand("decode")]
    | Annotated[FindNeurons, tyro.conf.subcommand("find")]
    | Annotated[ClampNeurons, tyro.conf.subcommand("clamp")]
)


@dataclass(frozen=True)
class NeuronCommands:
    """Read neurons' weights as tokens, search them by token, clamp neurons."""

    what: tyro.conf.OmitSubcommandPrefixes[Command]

    def run(self) -> None:
        self.what.run()
