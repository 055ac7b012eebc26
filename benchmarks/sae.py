"""One training step of a TopK autoencoder: ours, SAELens' trainer and a plain dense PyTorch step, side by side.

    python benchmarks/sae.py --saelens-python /path/to/an/environment/bin/python --out benchmarks/results/sae.json
    python benchmarks/sae.py --dispatch            # sparse against dense products by density
    python benchmarks/sae.py --parts               # where our step's time goes

SAELens needs transformer_lens < 4 and so lives in an environment of its own; a child process there (`saelens_step.py`)
trains when it is told to, on the same batches in the same order, in turns with ours, while the other one waits. Same data, batch,
number of steps and learning rate (constant, Adam); each in its own defaults otherwise: SAELens' decoder starts at norm
.1 and is free, ours is unit. Losses are |x - xhat|^2 on rows that neither has seen. Data: a dictionary of 4,096
Zipf-distributed features, 32 at a time.
"""

import json
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
import tyro
from safetensors.torch import save_file

from benchmarks.machine import describe_machine
from interp.features.config import SAEConfig
from interp.features.sae import SAE
from interp.features.synthetic import zipf_dictionary
from interp.features.train import Learner, Training


@dataclass
class Options:
    """What is timed."""

    d: int = 768
    """Channels."""
    h: int = 12288
    """Latents."""
    k: int = 32
    """Latents per token."""
    batch: int = 1024
    """Tokens per step."""
    rounds: int = 8
    """Turns that each takes; the first is not counted."""
    steps: int = 5
    """Steps in a turn."""
    lr: float = 3e-4
    """Adam's, constant."""
    threads: int | None = None
    """Torch threads of each (default: torch's own)."""
    device: str = "cpu"
    """Where all three train."""
    saelens_python: Path | None = None
    """A Python that has SAELens; without one it is left out."""
    dispatch: bool = False
    """Time sparse and dense products at several densities instead."""
    parts: bool = False
    """Time the parts of our step instead."""
    out: Path | None = None
    """JSON to write."""


def synchronize(device: str) -> None:
    if torch.device(device).type != "cpu":
        torch.cuda.synchronize()


class Ours:
    """Our step; narrow: bfloat16 chooses the latents."""

    def __init__(self, o: Options, dtype: str):
        config = SAEConfig(d_in=o.d, d_sae=o.h, k=o.k)
        training = Training(steps=10**9, lr=o.lr, decay=0.0, encoder_dtype=dtype)
        self.learner = Learner(SAE(config, device=o.device), training)

    def run(self, batches: list[torch.Tensor]) -> None:
        for x in batches:
            self.learner.step(x, x)

    @torch.no_grad()
    def loss(self, x: torch.Tensor) -> float:
        return float((x - self.learner.sae(x)).square().sum(1).mean())


class Plain:
    """What one would write: dense codes, autograd, torch's Adam, rows renormalised."""

    def __init__(self, o: Options):
        ours = SAE(SAEConfig(d_in=o.d, d_sae=o.h, k=o.k), device=o.device)
        self.k = o.k
        self.W_enc = ours.W_enc.detach().clone().contiguous().requires_grad_()
        self.W_dec = ours.W_dec.detach().clone().requires_grad_()
        self.b_enc, self.b_dec = (torch.zeros(n, device=o.device, requires_grad=True) for n in (o.h, o.d))
        self.adam = torch.optim.Adam([self.W_enc, self.W_dec, self.b_enc, self.b_dec], lr=o.lr)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = (x - self.b_dec) @ self.W_enc + self.b_enc
        top = z.topk(self.k, dim=1)
        f = torch.zeros_like(z).scatter(1, top.indices, top.values.relu())
        return f @ self.W_dec + self.b_dec

    def run(self, batches: list[torch.Tensor]) -> None:
        for x in batches:
            loss = (x - self.forward(x)).square().sum(1).mean()
            self.adam.zero_grad()
            loss.backward()
            self.adam.step()
            with torch.no_grad():
                self.W_dec /= self.W_dec.norm(dim=1, keepdim=True)

    @torch.no_grad()
    def loss(self, x: torch.Tensor) -> float:
        return float((x - self.forward(x)).square().sum(1).mean())


class SAELens:
    """A child process in SAELens' environment."""

    def __init__(self, o: Options, data: Path):
        script = Path(__file__).with_name("saelens_step.py")
        asked = {"d": o.d, "h": o.h, "k": o.k, "batch": o.batch, "lr": o.lr, "threads": torch.get_num_threads(),
                 "device": o.device, "data": str(data), "steps": o.rounds * o.steps}  # fmt: skip
        self.child = subprocess.Popen([str(o.saelens_python), str(script), json.dumps(asked)], stdin=subprocess.PIPE,
                                      stdout=subprocess.PIPE, text=True)  # fmt: skip
        self.version = self.ask("version")

    def ask(self, command: str) -> str:
        self.child.stdin.write(command + "\n")
        self.child.stdin.flush()
        while line := self.child.stdout.readline():
            if line.startswith("="):
                return line[1:].strip()
        raise SystemExit("SAELens' process ended; its message is above")


def compare(o: Options) -> dict:
    """Turns of each, and the losses at the end."""
    truth = zipf_dictionary(o.d, 4096, 32, seed=0)
    x, _ = truth.sample(o.batch * o.rounds * o.steps + 4096, seed=1)
    x, held_out = x[:-4096].contiguous(), x[-4096:].contiguous()
    batches = [b.to(o.device) for b in x.split(o.batch)]
    held_out = held_out.to(o.device)
    mine = {"interp": Ours(o, "float32"), "interp, bfloat16 encoder": Ours(o, "bfloat16"), "plain PyTorch": Plain(o)}
    with tempfile.TemporaryDirectory() as folder:
        theirs = {}
        if o.saelens_python is not None:
            data = Path(folder) / "data.safetensors"
            save_file({"train": x, "held_out": held_out.cpu()}, data)
            theirs = {"SAELens": SAELens(o, data)}
        times: dict[str, list[float]] = {name: [] for name in (*mine, *theirs)}
        for r in range(o.rounds):
            turn = batches[r * o.steps : (r + 1) * o.steps]
            for name, contender in mine.items():
                synchronize(o.device)
                start = time.perf_counter()
                contender.run(turn)
                synchronize(o.device)
                times[name].append((time.perf_counter() - start) / o.steps)
            for name, child in theirs.items():
                times[name].append(float(child.ask(f"run {o.steps}")) / o.steps)
        losses = {name: contender.loss(held_out) for name, contender in mine.items()}
        losses |= {name: float(child.ask("loss")) for name, child in theirs.items()}
        versions = {name: child.version for name, child in theirs.items()}
        for child in theirs.values():
            child.child.stdin.close()
            child.child.wait()
    base = float((held_out - held_out.mean(0)).square().sum(1).mean())
    rows = {}
    for name, took in times.items():
        seconds = median(took[1:])
        rows[name] = {
            "ms": 1e3 * seconds,
            "tokens_per_s": o.batch / seconds,
            "loss": losses[name],
            "fvu": losses[name] / base,
        }
    return {"rows": rows, "versions": versions, "steps": o.rounds * o.steps}


def show(result: dict) -> None:
    rows = result["rows"]
    print(f"\n{'step':30} {'ms':>9} {'tokens/s':>10} {'loss':>9} {'FVU':>8}   ours is faster by")
    for name, row in rows.items():
        ratio = row["ms"] / rows["interp"]["ms"]
        print(
            f"{name:30} {row['ms']:9.1f} {row['tokens_per_s']:10.0f} {row['loss']:9.4f} {row['fvu']:8.4f}   {ratio:.2f}x"
        )
    print(f"medians per step; losses after {result['steps']} steps on 4,096 rows that none has seen")


def dispatch(o: Options) -> dict:
    """Sparse against dense: decode, values' gradient and both weights' gradients, at several densities."""
    from interp.features import codes as module

    result, generator = {}, torch.Generator().manual_seed(0)
    weight = F.normalize(torch.randn(o.h, o.d, generator=generator), dim=1).to(o.device)
    g = torch.randn(o.batch, o.d, generator=generator).to(o.device)
    limit = module.SPARSE_BELOW
    try:
        for k in (8, 32, 128, 256, 512, 1024, 2048):
            latents = torch.rand(o.batch, o.h, generator=generator).topk(k, sorted=False).indices.sort(1).values
            codes = module.Codes.of_rows(
                torch.rand(o.batch, k, generator=generator).to(o.device), latents.to(o.device), o.h
            )
            times = {}
            for name, below in (("sparse", 1.0), ("dense", 0.0)):
                module.SPARSE_BELOW = below
                took = []
                for _ in range(4):
                    synchronize(o.device)
                    start = time.perf_counter()
                    codes.decode(weight)
                    slope = codes.dots(weight, g)
                    codes.outer([codes.values, slope], [g, g])
                    synchronize(o.device)
                    took.append(time.perf_counter() - start)
                times[name] = 1e3 * median(took[1:])
            result[k] = times
            print(
                f"k {k:5}  1/{o.h // k:<5} sparse {times['sparse']:8.1f} ms  dense {times['dense']:8.1f} ms", flush=True
            )
    finally:
        module.SPARSE_BELOW = limit
    return result


def parts(o: Options) -> None:
    """A profile of ten of our steps."""
    from torch.profiler import ProfilerActivity, profile

    ours = Ours(o, "float32")
    batches = list(torch.randn(o.batch * 10, o.d).to(o.device).split(o.batch))
    ours.run(batches[:3])
    with profile(activities=[ProfilerActivity.CPU]) as found:
        ours.run(batches)
    print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=25))


def main(o: Options) -> None:
    if o.threads is not None:
        torch.set_num_threads(o.threads)
    if o.parts:
        return parts(o)
    result = {
        "machine": describe_machine(o.device),
        "torch": torch.__version__,
        "options": {n: str(v) for n, v in vars(o).items() if n not in ("out", "saelens_python")},
    }
    result |= {"dispatch": dispatch(o)} if o.dispatch else compare(o)
    if not o.dispatch:
        show(result)
    if o.out is not None:
        o.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__.splitlines()[0]))
