"""Exact patching: interp's engines beside TransformerLens' own patching functions, in one process, on the same inputs.

    python benchmarks/patching.py                          mini-gpt2, 8 x 16 tokens, none and 10 of them shared
    python benchmarks/patching.py --model gpt2-small-shape --repeats 1
    python benchmarks/patching.py --out benchmarks/results/name-of-machine.json

The job is resid_pre + attn_out + mlp_out + every head, each at every position, denoising, logit difference. The peer's
functions are called as its documentation says, unmodified. All sides are warmed up; times are medians; that the numbers
agree is checked before any time is printed. `of plain` is the share of a plain large-batch forward pass's tokens per
second that the engine would need to do the naive amount of work in its time.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch

from interp import PromptPairs, activation_patching, bundled_models, load_model
from interp.files import write_atomically
from interp.model.load import quiet_libraries

SITES = ("resid_pre", "attn_out", "mlp_out", "head")


def model_folder(name: str, scratch: Path) -> Path:
    """A bundled model's folder, or a random model of GPT-2 small's shape in the scratch folder."""
    bundled = bundled_models()
    if name in bundled:
        return bundled[name]
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config()).save_pretrained(scratch)  # 12 layers, d_model 768, vocabulary 50257
    AutoTokenizer.from_pretrained(bundled["mini-gpt2"]).save_pretrained(scratch)
    return scratch


def make_pairs(d_vocab: int, n: int, width: int, shared: int) -> PromptPairs:
    """Random prompts whose first `shared` tokens are the same in the clean and the corrupt one."""
    generator = torch.Generator().manual_seed(0)
    clean, corrupt = torch.randint(d_vocab, (2, n, width), generator=generator)
    corrupt[:, :shared] = clean[:, :shared]
    corrupt[:, shared] = (clean[:, shared] + 1) % d_vocab
    return PromptPairs(clean, corrupt, torch.arange(n), torch.arange(n) + n)


def peer(bridge, pairs: PromptPairs) -> dict[str, np.ndarray]:
    """Mean patched logit difference by TransformerLens' functions; heads as [layer, position, head]."""
    from transformer_lens import patching

    rows = torch.arange(len(pairs))

    def metric(logits):
        last = logits[:, -1]
        return (last[rows, pairs.answers[:, 0]] - last[rows, pairs.wrong_answers[:, 0]]).mean()

    _, cache = bridge.run_with_cache(pairs.clean)
    names = ("resid_pre", "attn_out", "mlp_out", "attn_head_out_by_pos")
    found = {n: getattr(patching, f"get_act_patch_{n}")(bridge, pairs.corrupt, cache, metric) for n in names}
    return {site: value.numpy() for site, value in zip(SITES, found.values(), strict=True)}


def ours(model, pairs: PromptPairs, engine: str) -> dict[str, np.ndarray]:
    """The same by `activation_patching`, as mean patched values."""
    effects = activation_patching(model, pairs, SITES, engine=engine)
    base = float(effects.metric_corrupt.mean())
    by_site = {site: effects["head_out" if site == "head" else site].mean("prompt") + base for site in SITES}
    by_site["head"] = by_site["head"].transpose("layer", "position", "head")
    return {site: array.values for site, array in by_site.items()}


def median_seconds(job, repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        job()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description="exact patching beside TransformerLens")
    parser.add_argument("--model", default="mini-gpt2", help="a bundled model, or gpt2-small-shape")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--shared", type=int, nargs="+", default=[0, 10])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    from transformer_lens.model_bridge import TransformerBridge

    results = []
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        with quiet_libraries():
            folder = model_folder(options.model, Path(scratch))
            model, bridge = load_model(folder), TransformerBridge.boot_transformers(str(folder), device="cpu").eval()
        many = torch.randint(model.cfg.d_vocab, (64, options.width))
        model(many)
        plain = many.numel() / median_seconds(lambda: model(many, return_type=None), 5)
        cells = model.cfg.n_layers * options.width * (3 + model.cfg.n_heads)
        print(
            f"{options.model}, {options.prompts} x {options.width} tokens, {cells} cells, {torch.get_num_threads()} threads"
        )
        print(f"{'shared':>6} {'engine':>16} {'seconds':>9} {'x peer':>7} {'cells/s':>9} {'of plain':>9}")
        for shared in options.shared:
            pairs = make_pairs(model.cfg.d_vocab, options.prompts, options.width, shared)
            jobs = {
                "transformer_lens": lambda pairs=pairs: peer(bridge, pairs),
                "interp hooks": lambda pairs=pairs: ours(model, pairs, "hooks"),
                "interp sweep": lambda pairs=pairs: ours(model, pairs, "sweep"),
            }
            answers = {name: job() for name, job in jobs.items()}  # the warm-up
            for name, answer in answers.items():
                for site in SITES:
                    expected = answers["transformer_lens"][site]
                    np.testing.assert_allclose(answer[site], expected, atol=1e-4 * np.abs(expected).max(), err_msg=name)
            seconds = {name: median_seconds(job, options.repeats) for name, job in jobs.items()}
            for name, took in seconds.items():
                ratio = seconds["transformer_lens"] / took
                naive = cells * options.prompts * options.width / took / plain
                print(f"{shared:>6} {name:>16} {took:>9.3f} {ratio:>7.1f} {cells / took:>9.0f} {naive:>9.2f}")
                results.append({"model": options.model, "prompts": options.prompts, "width": options.width,
                                "shared": shared, "engine": name, "seconds": took, "ratio": ratio, "cells": cells})  # fmt: skip
    if options.out:
        about = {"machine": platform.processor() or platform.machine(), "threads": torch.get_num_threads(),
                 "torch": torch.__version__, "results": results}  # fmt: skip
        write_atomically(options.out, json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
