"""Training sparse autoencoders: any number of them on one stream of activations.

    corpus = Corpus.from_file(model, "stories.json")
    source = ModelSource(model, corpus, ["blocks.2.hook_resid_post"])
    saes = train_saes(source, {"k16": SAEConfig(d_in=128, d_sae=2048, k=16, hook="blocks.2.hook_resid_post")}, steps=2000)

Each SAE has its own weights, optimiser and counters and sees the same batches, so that it becomes bit for bit what it becomes
alone. With a folder, training writes a log (JSON lines) and checkpoints; started again with the same folder it goes on, and what
comes out equals the uninterrupted run's bit for bit on a CPU.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from interp.errors import OptionError
from interp.features.checkpoints import TrainingFolder
from interp.features.config import SPARSE, SAEConfig
from interp.features.memory import plan_memory
from interp.features.objective import objective
from interp.features.optimizer import Adam
from interp.features.sae import SAE
from interp.features.shuffle import Shuffled
from interp.features.sources import Corpus, ModelSource, Source

Logger = Callable[[dict], None]
DEAD_EVERY = 16  # steps between looks at which latents are dead: a GPU has to be waited for to know


@dataclass(frozen=True, kw_only=True)
class Training:
    """How SAEs are trained: everything but what they are.

    steps, batch_size: of tokens. lr: default 2e-4 / sqrt(d_sae / 2^14), for each SAE its own.
    warmup, decay: shares of the steps over which the rate rises from 0 and falls to 0. sparsity_warmup: share over which the
    sparsity coefficient rises. anneal_k: share over which k falls from d_in (at most d_sae) to the config's.
    b_dec: "mean" or "zero": of the first data. buffer: rows shuffled at a time. clip: norm of the gradient, if it is larger.
    encoder_dtype: of the product that chooses latents (values are computed in full precision either way).
    threshold_rate: of batchtopk's running threshold.
    """

    steps: int
    batch_size: int = 1024
    lr: float | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    warmup: float = 0.0
    decay: float = 0.2
    sparsity_warmup: float = 0.0
    anneal_k: float = 0.0
    b_dec: str = "mean"
    buffer: int = 262_144
    clip: float | None = None
    encoder_dtype: str = "float32"
    threshold_rate: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "buffer"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("warmup", "decay", "sparsity_warmup", "anneal_k"):
            if not 0 <= getattr(self, name) <= 1:
                raise OptionError(f"{name} is a share of the steps, from 0 to 1, not {getattr(self, name)}")
        if self.lr is not None and not self.lr > 0:
            raise OptionError(f"lr must be positive, not {self.lr}")
        if self.b_dec not in ("mean", "zero"):
            raise OptionError(f"b_dec starts at 'mean' or 'zero', not {self.b_dec!r}")
        if self.encoder_dtype not in ("float32", "bfloat16"):
            raise OptionError(f"encoder_dtype is 'float32' or 'bfloat16', not {self.encoder_dtype!r}")

    def rate(self, step: int, d_sae: int) -> float:
        """The learning rate of a step, counted from 0."""
        full = self.lr if self.lr is not None else 2e-4 / math.sqrt(d_sae / 2**14)
        rising = min(1.0, (step + 1) / max(1.0, self.warmup * self.steps))
        falling = min(1.0, (self.steps - step) / max(1.0, self.decay * self.steps))
        return full * min(rising, falling)


class Learner:
    """One SAE while it is trained: weights, optimiser, what is known of dead latents."""

    def __init__(self, sae: SAE, training: Training):
        config = sae.config
        self.sae, self.training, self.n_steps = sae, training, 0
        parameters = {name: p.requires_grad_() for name, p in sae.named_parameters()}
        if config.faithful:
            parameters.pop("b_enc")
        unit = {"W_dec"} if config.unit_decoder and not config.faithful else set()
        unit |= {"encoder"} if config.tied else set()
        self.adam = Adam(
            parameters, betas=training.betas, eps=training.eps, unit=frozenset(unit),
            late=frozenset({"W_dec"} if config.faithful else ()),
        )  # fmt: skip
        self.since_fired = torch.zeros(config.d_sae, dtype=torch.int64, device=sae.device)
        self.dead = torch.zeros(0, dtype=torch.int64, device=sae.device)  # as it was when last looked at
        self.input_norm = torch.zeros((), dtype=torch.float64, device=sae.device)  # mean norm of the first inputs
        # latents are chosen in a narrower dtype only where something is chosen
        narrow = training.encoder_dtype == "bfloat16" and config.architecture in SPARSE and config.kron is None
        self.narrow = sae.encoder.detach().to(torch.bfloat16) if narrow else None

    @torch.enable_grad()
    def step(self, x: Float[Tensor, "token d_in"], y: Float[Tensor, "token d_out"]) -> dict[str, Tensor]:
        """One step on a batch in the data's own scale; what it was like, as scalars still on the device."""
        sae, training, config = self.sae, self.training, self.sae.config
        same = y is x
        x, (factor, shift) = sae.normalize(x)
        y = x if same else (y - shift) / factor
        if self.n_steps % DEAD_EVERY == 0:
            self.dead = (self.since_fired > config.dead_after).nonzero()[:, 0]
        done = self.n_steps / training.steps
        out = objective(
            sae, x, y, dead=self.dead if len(self.dead) else None, encoder=self.narrow,
            sparsity=min(1.0, done / training.sparsity_warmup) if training.sparsity_warmup else 1.0, k=self._k(done),
        )  # fmt: skip
        out.loss.backward()
        if training.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.adam.parameters.values(), training.clip)
        copies = None if self.narrow is None else {"encoder": self.narrow}
        self.adam.step(training.rate(self.n_steps, config.d_sae), copies=copies)
        with torch.no_grad():
            self.since_fired += len(x)
            self.since_fired[out.fired] = 0
            if config.architecture == "jumprelu":
                sae.threshold.clamp_min_(0)  # on the data: a clamp in the graph would hold at 0 what has reached it
            if out.lowest is not None:
                lowest = out.lowest.double()
                first = self.n_steps == 0  # an average started at 0 is too low for hundreds of steps
                sae.batch_threshold.lerp_(lowest, 1.0 if first else training.threshold_rate)
            variance = (y - y.mean(0)).square().sum()
            fvu = out.error.square().sum() / variance
        self.n_steps += 1
        return {"loss": out.loss.detach(), "l0": out.l0, "fvu": fvu,
                "dead": (self.since_fired > config.dead_after).sum() / config.d_sae}  # fmt: skip

    def _k(self, done: float) -> int | None:
        k, share = self.sae.config.k, self.training.anneal_k
        if k is None or done >= share:
            return None
        start = min(self.sae.config.d_in, self.sae.config.d_sae)
        return max(k, round(start + (k - start) * done / share))

    def state(self) -> dict[str, Tensor]:
        """Everything that training changes, by name."""
        return {
            **{f"sae.{n}": t for n, t in self.sae.state_dict().items()},
            **self.adam.state(),
            "since_fired": self.since_fired, "dead": self.dead, "input_norm": self.input_norm,
        }  # fmt: skip

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor], n_steps: int) -> None:
        """Go on from `state()` after so many steps."""
        for name, tensor in self.sae.state_dict().items():
            tensor.copy_(state[f"sae.{name}"])
        self.adam.load(state, n_steps)
        self.since_fired.copy_(state["since_fired"])
        self.input_norm.copy_(state["input_norm"])
        self.dead = state["dead"].to(self.sae.device)
        self.n_steps = n_steps
        if self.narrow is not None:
            self.narrow.copy_(self.sae.encoder)


def train_saes(
    source: Source, configs: Mapping[str, SAEConfig], *, training: Training | None = None, folder: str | Path | None = None,
    checkpoint_every: int = 500, log_every: int = 50, loggers: Sequence[Logger] = (), device: torch.device | str | None = None,
    progress: bool = False, announce: Callable[[object], None] | None = None, max_memory: int | None = None, **options,
) -> dict[str, SAE]:  # fmt: skip
    """Train SAEs on one stream of activations; the trained ones by name, with scale and norms folded in.

    configs: by name; each reads `config.hook` of the source (a transcoder also `config.target_hook`); with one hook in the
        source it may be left out. training: or its fields as options (`steps=2000, lr=3e-4`), which come
        before its own.
    folder: where log (`log.jsonl`) and checkpoints go, and from where an interrupted run of the same options goes on. The
        trained SAEs are saved in it, in a folder each. loggers: called with each record as well (`checkpoints.wandb`).
    device: where SAEs live (default: where activations are). announce: told the planned memory before the first step.
    Raises `OptionError` where the plan exceeds the memory there is, or the folder holds another run.
    """
    training = Training(**options) if training is None else replace(training, **options)
    if not configs:
        raise OptionError("there is no SAE to train: configs is empty")
    configs = {name: _with_hook(name, config, source) for name, config in configs.items()}
    plan = plan_memory(configs, training.batch_size, source, training.buffer, training.encoder_dtype)
    if announce is not None:
        announce(plan)
    plan.check(device, max_memory)
    stream = Shuffled(source, training.batch_size, capacity=training.buffer, seed=training.seed)
    store = None
    if folder is not None:
        for name in configs:
            if Path(name).name != name or name in ("", "..", "run.json", "log.jsonl") or name.startswith("checkpoint"):
                raise OptionError(f"an SAE cannot be called {name!r} in a training run's folder, where it gets its own")
        data = {"widths": source.widths, "n_sequences": source.n_sequences,
                "rows_per_sequence": source.rows_per_sequence, **source.about}  # fmt: skip
        saes = {name: asdict(config) for name, config in configs.items()}
        store = TrainingFolder(folder, {"training": asdict(training), "configs": saes, "source": data})
    saved = None if store is None else store.latest()
    if saved is not None:
        stream.position = saved.position
    learners = {
        name: _learner(config, training, source, stream, device, saved is None) for name, config in configs.items()
    }
    if saved is not None:
        for name, learner in learners.items():
            learner.load(saved.tensors[name], saved.step)
    first = 0 if saved is None else saved.step
    loggers = [*loggers, *([] if store is None else [store.logger(first)])]
    with tqdm(total=training.steps, initial=first, desc="SAE", disable=not progress) as bar:
        for step in range(first, training.steps):
            batch = stream.next()
            batch = batch if device is None else {hook: values.to(device) for hook, values in batch.items()}
            said = {}
            for name, learner in learners.items():
                config = learner.sae.config
                said[name] = learner.step(batch[config.hook], batch[config.target_hook or config.hook])
            bar.update()
            last = step + 1 == training.steps
            logs = last or (step + 1) % log_every == 0
            saves = store is not None and (last or (step + 1) % checkpoint_every == 0)
            if logs or saves:
                records = _records(step + 1, said, learners, training)
            if logs:
                _report(step + 1, records, learners, training, loggers, bar)
            if saves:
                store.save(step + 1, stream.position, {name: learner.state() for name, learner in learners.items()})
    trained = {name: _finished(learner, source) for name, learner in learners.items()}
    if store is not None:
        for name, sae in trained.items():
            sae.save(store.folder / name)
    return trained


def train_sae(model, corpus, hook: str, *, config: SAEConfig | None = None, d_sae: int | None = None, **options) -> SAE:
    """Train one SAE on a model's activations at a hook point; see `train_saes` and `Training` for the options.

    corpus: a `Corpus`, a list of texts, or a file of texts. config: what to train (default: TopK with k=32 and 8 latents for
    each channel, or `d_sae`); its hook is filled in.
    """
    if isinstance(corpus, str | Path):
        corpus = Corpus.from_file(model, corpus)
    elif not isinstance(corpus, Corpus):
        corpus = Corpus.from_texts(model, corpus)
    hooks = [hook] if config is None or config.target_hook is None else [hook, config.target_hook]
    source = ModelSource(model, corpus, hooks)
    d_in = source.widths[hook]
    if config is not None and d_sae is not None:
        raise OptionError("config says how many latents there are: leave d_sae out")
    if config is None:
        config = SAEConfig(d_in=d_in, d_sae=d_sae or 8 * d_in, k=min(32, d_in // 4))
    return train_saes(source, {"sae": replace(config, hook=hook)}, **options)["sae"]


def _with_hook(name: str, config: SAEConfig, source: Source) -> SAEConfig:
    hook = config.hook or (next(iter(source.widths)) if len(source.widths) == 1 else None)
    if hook is None:
        raise OptionError(f"{name} does not say which hook it reads, and there are {', '.join(source.widths)}")
    for place, width in ((hook, config.d_in), (config.target_hook, config.out)):
        if place is not None and place not in source.widths:
            raise OptionError(f"{name} reads {place!r}, and the source has {', '.join(source.widths)}")
        if place is not None and source.widths[place] != width:
            raise OptionError(f"{name} expects {width} channels at {place}, and there are {source.widths[place]}")
    return replace(config, hook=hook)


@torch.no_grad()
def _learner(config: SAEConfig, training: Training, source: Source, stream: Shuffled, device, fresh: bool) -> Learner:
    rows = stream.first_rows(config.hook) if fresh or device is None else None
    sae = SAE(config, seed=training.seed, device=device if device is not None else rows.device)
    if fresh:
        target = stream.first_rows(config.target_hook) if config.target_hook else rows
        if config.normalize == "expected_average_only_in":
            for scale, values in ((sae.scale_in, rows), (sae.scale_out, target)):
                scale.fill_(values.shape[1] ** 0.5 / float(values.norm(dim=1).mean(dtype=torch.float64)))
        if training.b_dec == "mean":
            total, n = torch.zeros(config.out, dtype=torch.float64, device=sae.device), 0
            for x, y in zip(rows.split(65_536), target.split(65_536), strict=True):
                _, (factor, shift) = sae.normalize(x.to(sae.device))
                total += ((y.to(sae.device) - shift) / factor).sum(0, dtype=torch.float64)
                n += len(y)
            sae.b_dec.copy_(total / n)
    learner = Learner(sae, training)
    if fresh:
        learner.input_norm.fill_(rows.norm(dim=1).mean(dtype=torch.float64))
    return learner


def _records(step: int, said: dict, learners: dict, training: Training) -> dict[str, dict[str, float]]:
    """What the SAEs were like in a step, as plain numbers. Raises `OptionError` naming one whose loss is not finite."""
    records = {name: {key: float(value) for key, value in values.items()} for name, values in said.items()}
    for name, record in records.items():
        if not math.isfinite(record["loss"]):
            raise OptionError(f"the loss of {name} is {record['loss']} after step {step}: try a smaller lr than "
                              f"{training.rate(0, learners[name].sae.config.d_sae):.1e}")  # fmt: skip
    return records


def _report(step: int, records: dict, learners: dict, training: Training, loggers: Sequence[Logger], bar) -> None:
    for name, record in records.items():
        rate = training.rate(step - 1, learners[name].sae.config.d_sae)
        for log in loggers:
            log({"step": step, "tokens": step * training.batch_size, "sae": name, "lr": rate, **record})
    name, record = next(iter(records.items()))
    shown = {"L0": f"{record['l0']:.1f}", "FVU": f"{record['fvu']:.3f}", "dead": f"{record['dead']:.1%}"}
    bar.set_postfix(shown if len(records) == 1 else {"of": name, **shown})


@torch.no_grad()
def _finished(learner: Learner, source: Source) -> SAE:
    sae = learner.sae.requires_grad_(False)
    if sae.config.faithful:
        sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True).clamp_min(1e-12)
    for p in sae.parameters():
        p.grad = None
    sae.metadata.update(source.about, hook_name=sae.config.hook, training_architecture=sae.config.architecture,
                        activation_mean_norm=float(learner.input_norm))  # fmt: skip
    return sae.folded()
