"""`interp sae`: train sparse autoencoders and transcoders, judge them, look at their latents.

interp sae train --hook blocks.2.hook_resid_post --out my-sae
interp sae eval my-sae/sae
interp sae show mini-gpt2/resid_post2 --latents 3 17
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

if TYPE_CHECKING:
    from interp.features.sae import SAE
    from interp.features.sources import Corpus


@dataclass(frozen=True, kw_only=True)
class Text:
    """The text whose activations are used."""

    text: Path | None = None
    """.txt (paragraphs), .json or .jsonl (texts); bundled models have text of their own."""
    context: int = 128
    """Tokens of a sequence, at most."""
    n_texts: int | None = None
    """Only so many of the texts."""
    device: str | None = None
    """Default: torch's default device."""
    quiet: bool = False
    """No progress bars and no plans."""

    def corpus(self, model) -> "Corpus":
        """The file's texts as token sequences."""
        from interp.features.sources import Corpus

        return Corpus.from_file(model, self.text, n_texts=self.n_texts, context=self.context)


@dataclass(frozen=True, kw_only=True)
class TrainSAE(Text):
    """Train a sparse autoencoder (with --target-hook a transcoder), judge it on text kept apart, and save it."""

    hook: str
    """Where its inputs come from, as blocks.2.hook_resid_post."""
    out: Path
    """Folder of the run: log, checkpoints and the trained SAE; the same command goes on with an interrupted run."""
    model: str = "mini-gpt2"
    """Bundled model, folder in Hugging Face's layout, or hub name."""
    architecture: str = "topk"
    """standard, gated, topk, abstopk, batchtopk, matryoshka, jumprelu or top-afa."""
    d_sae: int | None = None
    """Latents (default: 8 for each channel)."""
    k: int | None = None
    """Latents per token, of the architectures that are told (default: an eighth of the channels)."""
    target_hook: str | None = None
    """Train a transcoder to this activation."""
    skip: bool = False
    """A transcoder's linear path from input to output."""
    sparsity: float = 0.0
    """Coefficient of the architecture's own penalty."""
    afa: Literal["corrected", "faithful"] = "corrected"
    """top-afa: repaired, or as published."""
    steps: int = 2000
    """Steps."""
    batch_size: int = 1024
    """Tokens per step."""
    lr: float | None = None
    """Learning rate (default: 2e-4 / sqrt(latents / 16384))."""
    dead_after: int = 200_000
    """Tokens without firing after which a latent counts as dead."""
    held_out: float = 0.1
    """Share of the sequences kept apart to judge by."""
    bf16: bool = False
    """Choose latents in bfloat16; values are computed in full."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    max_memory: str | None = None
    """Refuse to start if training would take more, as 800M or 4G (default: what is free)."""
    seed: int = 0
    """Seed of weights, order and split."""

    def run(self) -> None:
        from interp.errors import OptionError, one_of
        from interp.features.config import ARCHITECTURES, WITH_K
        from interp.files import n_bytes

        one_of(self.architecture, ARCHITECTURES, "kind of sparse autoencoder")
        capped = self.architecture in WITH_K or (self.architecture == "top-afa" and self.afa == "corrected")
        if self.k is not None and not capped:
            raise OptionError(f"--k is not for {self.architecture}, which chooses how many latents fire by other means")
        if self.architecture in ("standard", "gated", "jumprelu") and not self.sparsity:
            raise OptionError(f"{self.architecture} is sparse by a penalty only: give its coefficient with --sparsity")
        memory = None if self.max_memory is None else n_bytes(self.max_memory)
        from interp.features.evaluate import evaluate_sae
        from interp.features.sources import ModelSource
        from interp.features.train import train_saes
        from interp.model.load import load_model

        model = load_model(self.model, device=self.device)
        kept, apart = self.corpus(model).split(self.held_out, seed=self.seed)
        hooks = list(dict.fromkeys(filter(None, (self.hook, self.target_hook))))
        source = ModelSource(model, kept, hooks)

        def announce(plan: object) -> None:
            if not self.quiet:
                print(f"interp: {plan}", file=sys.stderr)

        try:
            sae = train_saes(
                source, {"sae": self._config(source.widths)}, folder=self.out, checkpoint_every=self.checkpoint_every,
                progress=not self.quiet, announce=announce, max_memory=memory, steps=self.steps, batch_size=self.batch_size,
                lr=self.lr, seed=self.seed, encoder_dtype="bfloat16" if self.bf16 else "float32",
            )["sae"]  # fmt: skip
        except KeyboardInterrupt:
            print(
                f"interp: interrupted; the same command goes on from the last checkpoint in {self.out}", file=sys.stderr
            )
            raise SystemExit(130) from None
        found = evaluate_sae(model, sae, apart, ablation="both", progress=not self.quiet)
        sae.metadata.update(fvu=found.fvu, l0=found.l0, ce_recovered=found.ce_recovered)
        sae.save(self.out / "sae")
        print(f"{found}\n\nsaved: {(self.out / 'sae').resolve()}")

    def _config(self, widths: dict[str, int]):
        from interp.features.config import SAEConfig

        target = {"skip": self.skip}
        if self.target_hook is not None:
            target |= {
                "d_out": widths[self.target_hook],
                "target_hook": self.target_hook,
                "apply_b_dec_to_input": False,
            }
        return SAEConfig.usual(
            self.architecture, widths[self.hook], d_sae=self.d_sae, k=self.k, afa=self.afa, hook=self.hook,
            sparsity=self.sparsity, dead_after=self.dead_after, **target,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class OfSAE(Text):
    """A trained SAE and the model that it belongs to."""

    sae: Annotated[str, tyro.conf.Positional]
    """Folder in SAELens' format, or a bundled one (`interp sae list`)."""
    model: str | None = None
    """Default: the model that the SAE says it was trained on."""

    def load(self) -> "tuple[object, SAE, Corpus]":
        """Model, SAE and text; warns where they do not belong together."""
        from interp.errors import OptionError
        from interp.features.belonging import check_belongs
        from interp.features.sae import SAE
        from interp.model.load import load_model

        sae = SAE.load(self.sae, device=self.device)
        name = self.model or sae.metadata.get("model_name")
        if name is None:
            raise OptionError(f"{self.sae} does not say which model it belongs to: give one with --model")
        model = load_model(name, device=self.device)
        corpus = self.corpus(model)
        check_belongs(sae, model, corpus.tokens[:16, : int(corpus.lengths[:16].min())])
        return model, sae, corpus


@dataclass(frozen=True, kw_only=True)
class EvalSAE(OfSAE):
    """Judge a trained SAE: what it costs the model, what it leaves out, how sparse it is, what is dead."""

    select: Literal["own", "afa"] = "own"
    """afa: let top-AFA choose the latents of each token."""
    zf: Path | None = None
    """Write the ZF plot (code norm against input norm) to this .html file."""
    out: Path | None = None
    """Write the figures to this .json file."""

    def run(self) -> None:
        from interp.files import check_writable, write_atomically

        for path in (self.zf, self.out):
            if path is not None:
                check_writable(path)
        model, sae, corpus = self.load()
        from interp.features.evaluate import evaluate_sae

        found = evaluate_sae(model, sae, corpus, ablation="both", select=self.select, progress=not self.quiet)
        if self.out is not None:
            write_atomically(self.out, json.dumps(found.to_dict(), indent=2) + "\n")
        if self.zf is not None:
            import torch

            from interp.features.sources import ModelSource
            from interp.features.zf import zf_plot, zf_points

            some = corpus.take(torch.arange(min(64, len(corpus.tokens))))
            target = sae.config.target_hook or sae.config.hook
            rows = (
                ModelSource(model, some, [*dict.fromkeys((sae.config.hook, target))])
                .read(range(len(some.tokens)))
                .values
            )
            y = rows[target] if sae.config.transcoder else None
            points = zf_points(sae, rows[sae.config.hook], y, select=self.select)
            figure = zf_plot(points, d=sae.config.d_in, title=f"{sae!r}")
            write_atomically(self.zf, figure.to_html(include_plotlyjs=True))
        print(found)
        for what, path in (("figures", self.out), ("ZF plot", self.zf)):
            if path is not None:
                print(f"\n{what}: {path.resolve()}")


@dataclass(frozen=True, kw_only=True)
class ShowSAE(OfSAE):
    """Where latents fire most strongly, and which tokens they write."""

    latents: tuple[int, ...] = ()
    """Default: the eight that fire most strongly."""
    n: int = 6
    """Contexts of each."""
    out: Path | None = None
    """Write the contexts of all these latents to this .parquet file."""

    def run(self) -> None:
        from interp.errors import OptionError
        from interp.files import check_writable

        if self.n < 1:
            raise OptionError(f"cannot show {self.n} contexts")
        if self.out is not None and check_writable(self.out).suffix != ".parquet":
            raise OptionError(f"contexts are written as .parquet, not {self.out.suffix or 'without an ending'}")
        model, sae, corpus = self.load()
        from interp.errors import SiteError
        from interp.features.contexts import save_contexts, top_contexts
        from interp.features.effects import logit_effects

        table = top_contexts(model, sae, corpus, latents=self.latents or None, n=self.n, progress=not self.quiet)
        if self.out is not None:
            save_contexts(table, self.out)
        chosen = self.latents
        if not chosen:
            strongest = table.sort_values("value", ascending=False)["latent"].drop_duplicates()
            chosen = tuple(strongest.head(8).tolist())
        try:
            effects = logit_effects(model, sae, list(chosen), k=5)
        except SiteError:
            effects = None  # its decoder does not write to the residual stream
        for latent in chosen:
            rows = table[table["latent"] == latent]
            if rows.empty:
                print(f"latent {latent}: never fires on this text\n")
                continue
            print(f"latent {latent}: fires on {rows['density'].iloc[0]:.2%} of tokens")
            if effects is not None:
                mine = effects[effects["latent"] == latent]
                for side in ("top", "bottom"):
                    named = mine[mine["side"] == side]
                    print(
                        f"  {side + ' tokens':14}"
                        + "  ".join(f"{t!r} {v:+.2f}" for t, v in zip(named["token"], named["value"], strict=True))
                    )
            for row in rows.itertuples():
                print(f"  {row.value:8.2f}  {_line(row.before)}[{_line(row.token)}]{_line(row.after)}")
            print()
        if self.out is not None:
            print(f"contexts: {self.out.resolve()}")


def _line(text: str) -> str:
    return text.replace("\n", "\\n")


@dataclass(frozen=True)
class ListSAEs:
    """List the bundled sparse autoencoders and transcoders."""

    def run(self) -> None:
        from interp.bundled import bundled_saes

        for name, path in bundled_saes().items():
            config = json.loads((path / "cfg.json").read_text(encoding="utf-8"))
            facts = config["metadata"]
            kind = facts.get("training_architecture", config["architecture"])
            print(f"{name:26} {kind:12} {config['d_in']} -> {config['d_sae']} latents at {facts.get('hook_name')}")


Command = (
    Annotated[TrainSAE, tyro.conf.subcommand("train")]
    | Annotated[EvalSAE, tyro.conf.subcommand("eval")]
    | Annotated[ShowSAE, tyro.conf.subcommand("show")]
    | Annotated[ListSAEs, tyro.conf.subcommand("list")]
)


@dataclass(frozen=True)
class SAECommands:
    """Train, judge and look at sparse autoencoders and transcoders."""

    what: tyro.conf.OmitSubcommandPrefixes[Command]

    def run(self) -> None:
        self.what.run()
