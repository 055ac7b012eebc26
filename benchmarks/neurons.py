"""Decoding every neuron: ours, the bare matrix product of the same shapes, and a loop over neurons, side by side.

    python benchmarks/neurons.py --out benchmarks/results/neurons.json                   # GPT-2 small's shape, two cores
    python benchmarks/neurons.py --device cuda --shape llama-3.1-8b --dtype bfloat16 --screen bfloat16 --out ...

All up rows of a random model of the shape against its vocabulary. The bare product writes the scores of one layer after the
other into one buffer and looks at nothing. The loop takes one neuron at a time, as a notebook would: product, `torch.topk`; it is
timed on some neurons and scaled up. Ours is `decode_neurons` from the model to the table, without a tokenizer: one pole as the
loop, and both poles. Medians of turns, each contender after the other in every turn. Memory: the highest resident size during
ours over that before it (Linux), or torch's peak on a GPU.
"""

import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import tyro
from torch import Tensor

from benchmarks.machine import describe_machine
from interp import Transformer, decode_neurons
from interp.files import write_atomically
from interp.model.config import ModelConfig

SHAPES = {"gpt2-small": (12, 768, 3072, 50_257, False), "llama-3.1-8b": (32, 4096, 14_336, 128_256, True)}


@dataclass
class Options:
    """What is timed."""

    shape: str = "gpt2-small"
    """gpt2-small or llama-3.1-8b."""
    layers: int | None = None
    """Only so many."""
    k: int = 10
    """Tokens of each neuron and pole."""
    rounds: int = 3
    """Turns."""
    sample: int = 200
    """Neurons that the loop is timed on."""
    device: str = "cpu"
    """Where."""
    dtype: str = "float32"
    """Of the weights."""
    screen: str | None = None
    """bfloat16: what scores are screened in."""
    out: Path | None = None
    """JSON to write."""


def random_model(o: Options) -> Transformer:
    """Only what decoding reads is of the shape; attention is one head of one channel."""
    layers, d, d_mlp, vocabulary, gated = SHAPES[o.shape]
    layers = o.layers or layers
    cfg = ModelConfig(o.shape, "random", layers, d, 1, 1, 1, d_mlp, vocabulary, 8, norm="rms" if gated else "layer", eps=1e-5,
                      activation="silu" if gated else "gelu", gated=gated, attn_scale=(1.0,) * layers,
                      windows=(None,) * layers, rotary=(None,) * layers)  # fmt: skip
    g = torch.Generator(device=o.device).manual_seed(0)
    dtype = getattr(torch, o.dtype)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=o.device, dtype=torch.float32).mul_(0.02).to(dtype)

    weights = {"embed.W_E": drawn(vocabulary, d), "ln_final.w": torch.ones(d, device=o.device, dtype=dtype)}
    weights["unembed.W_U"] = weights["embed.W_E"].T
    for layer in range(layers):
        block = f"blocks.{layer}"
        for name in "QKV":
            weights[f"{block}.attn.W_{name}"] = drawn(1, d, 1)
        weights[f"{block}.attn.W_O"] = drawn(1, 1, d)
        for name in ("W_in", *(["W_gate"] if gated else [])):
            weights[f"{block}.mlp.{name}"] = drawn(d, d_mlp)
        weights[f"{block}.mlp.W_out"] = drawn(d_mlp, d)
        for norm in ("ln1", "ln2"):
            weights[f"{block}.{norm}.w"] = torch.ones(d, device=o.device, dtype=dtype)
    return Transformer(cfg, weights)


class Contenders:
    """What is timed, by name; each call is one whole decoding."""

    def __init__(self, model: Transformer, o: Options):
        self.model, self.o = model, o
        self.rows = [block.mlp.W_in.T.contiguous() for block in model.blocks]
        self.vocabulary = model.W_U.T.contiguous()
        self.buffer = torch.empty(min(1024, model.cfg.d_mlp), model.cfg.d_vocab, device=model.device, dtype=model.dtype)

    def bare(self) -> None:
        for rows in self.rows:
            for part in rows.split(len(self.buffer)):
                torch.mm(part, self.vocabulary.T, out=self.buffer[: len(part)])

    def loop(self) -> None:
        """On `sample` neurons."""
        for row in self.rows[0][: self.o.sample]:
            (self.vocabulary @ row).topk(self.o.k).indices.tolist()

    def one_pole(self) -> None:
        decode_neurons(self.model, matrix="up", k=self.o.k, poles="+", score="logit", screen=self.o.screen)

    def both_poles(self) -> None:
        decode_neurons(self.model, matrix="up", k=self.o.k, score="logit", screen=self.o.screen)


def resident(name: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024


def extra_memory(function, device: str) -> int | None:
    """Bytes at the peak beyond those before."""
    if torch.device(device).type != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    reset.write_text("5")  # the high-water mark starts anew
    before = resident("VmRSS")
    function()
    return resident("VmHWM") - before


def main(o: Options) -> None:
    model = random_model(o)
    contenders = Contenders(model, o)
    n = model.cfg.n_layers * model.cfg.d_mlp
    print(
        f"{n:,} neurons, d {model.cfg.d_model}, {model.cfg.d_vocab:,} tokens, {o.dtype}, {describe_machine(o.device)}"
    )
    named = {"bare product": contenders.bare, "loop over neurons": contenders.loop, "decode_neurons": contenders.one_pole,
             "decode_neurons, both poles": contenders.both_poles}  # fmt: skip
    times: dict[str, list[float]] = {name: [] for name in named}
    contenders.loop()
    for _ in range(o.rounds):
        for name, function in named.items():
            began = time.perf_counter()
            function()
            if torch.device(o.device).type != "cpu":
                torch.cuda.synchronize()
            times[name].append((time.perf_counter() - began) * (n / o.sample if name.startswith("loop") else 1))
    memory = extra_memory(contenders.one_pole, o.device)
    seconds = {name: median(took) for name, took in times.items()}
    print(f"\n{'':28} {'seconds':>9} {'of the product':>15} {'of the loop':>12}")
    for name, took in seconds.items():
        print(
            f"{name:28} {took:9.2f} {took / seconds['bare product']:14.2f}x {seconds['loop over neurons'] / took:11.1f}x"
        )
    if memory is not None:
        print(f"\nextra memory {memory / 1e6:.0f} MB")
    if o.out is not None:
        result = {"machine": describe_machine(o.device), "shape": o.shape, "neurons": n, "k": o.k, "dtype": o.dtype,
                  "screen": o.screen, "seconds": times, "extra_bytes": memory}  # fmt: skip
        write_atomically(o.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
