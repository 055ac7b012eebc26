"""What hooks and rules cost: `attribution` of every node beside the same pass written as plain autograd, in one process.

    python benchmarks/attribution.py                                 mini-gpt2 and GPT-2 small's shape, every rule set
    python benchmarks/attribution.py --model mini-gpt2 --prompts 64 --out benchmarks/results/attribution.json

The plain pass is what one would write by hand for this one model: torch.nn.functional's fused norms and activation on the
loaded weights, two forward passes, one backward pass, gradient times difference at resid_pre, attn_out, mlp_out and every
head. No hook points, no rules, no checks, no labels. That it gives the same numbers as rules="gradient" is checked first;
then all jobs take turns, and the ratio of medians is printed.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.machine import describe_machine
from benchmarks.patching import make_pairs, model_folder
from interp import PromptPairs, Transformer, attribution, load_model
from interp.files import write_atomically
from interp.model.load import quiet_libraries
from interp.rules import RULES

SITES = ("resid_pre", "attn_out", "mlp_out", "head")


def plain_forward(model: Transformer, resid: torch.Tensor, read_at: torch.Tensor, kept: list) -> torch.Tensor:
    """GPT-2's logits at the read positions; the sites' tensors are appended to `kept`."""
    cfg, rows = model.cfg, torch.arange(len(resid))
    future = torch.ones(resid.shape[1], resid.shape[1], dtype=torch.bool).triu(1)
    for block in model.blocks:
        attn, mlp = block.attn, block.mlp
        x = F.layer_norm(resid, (cfg.d_model,), block.ln1.w, block.ln1.b, cfg.eps)
        q, k, v = (
            torch.einsum("btd,hde->bhte", x, w) + b[:, None]
            for w, b in ((attn.W_Q, attn.b_Q), (attn.W_K, attn.b_K), (attn.W_V, attn.b_V))
        )
        scores = (q @ k.transpose(-1, -2) * attn.scale).masked_fill(future, -torch.inf)
        z = scores.softmax(-1) @ v
        attn_out = torch.einsum("bhte,hed->btd", z, attn.W_O) + attn.b_O
        kept += [resid, attn_out]
        resid = resid + attn_out
        x = F.layer_norm(resid, (cfg.d_model,), block.ln2.w, block.ln2.b, cfg.eps)
        mlp_out = F.gelu(x @ mlp.W_in + mlp.b_in, approximate="tanh") @ mlp.W_out + mlp.b_out
        kept += [mlp_out, z]
        resid = resid + mlp_out
    last = F.layer_norm(resid[rows, read_at], (cfg.d_model,), model.ln_final.w, model.ln_final.b, cfg.eps)
    return last @ model.W_U


def plain(model: Transformer, pairs: PromptPairs) -> dict[str, np.ndarray]:
    """Attribution patching by hand: [prompt, layer, (head,) position] per site."""
    embed = lambda ids: model.W_E[ids] + model.pos_embed.W_pos[: ids.shape[1]]  # noqa: E731
    there, here = [], []
    with torch.no_grad():
        plain_forward(model, embed(pairs.clean), pairs.read_at, there)
    with torch.enable_grad():
        logits = plain_forward(model, embed(pairs.corrupt).requires_grad_(), pairs.read_at, here)
        rows = torch.arange(len(pairs))
        metric = logits[rows, pairs.answers[:, 0]] - logits[rows, pairs.wrong_answers[:, 0]]
        gradients = torch.autograd.grad(metric.sum(), here)
    scores = [((s - b.detach()) * g).sum(-1) for s, b, g in zip(there, here, gradients, strict=True)]
    return {site: torch.stack(scores[i::4], 1).numpy() for i, site in enumerate(SITES)}


def measure(name: str, options) -> list[dict]:
    """Seconds of every rule set on one model, beside the plain pass."""
    with tempfile.TemporaryDirectory() as scratch, quiet_libraries():
        model = load_model(model_folder(name, Path(scratch)))
    pairs = make_pairs(model.cfg.d_vocab, options.prompts, options.width, 0, "cpu")
    by_hand, ours = plain(model, pairs), attribution(model, pairs, SITES)
    for site in SITES:
        found = ours["head_out" if site == "head" else site].values
        np.testing.assert_allclose(found, by_hand[site], atol=1e-4 * np.abs(by_hand[site]).max(), err_msg=site)
    jobs = {"plain autograd": lambda: plain(model, pairs)}
    jobs |= {rules: lambda rules=rules: attribution(model, pairs, SITES, rules=rules) for rules in options.rules}
    took: dict[str, list[float]] = {job: [] for job in jobs}
    for turn in range(options.repeats + 1):
        for job, run in jobs.items():
            start = time.perf_counter()
            run()
            if turn:
                took[job].append(time.perf_counter() - start)
    medians = {job: statistics.median(times) for job, times in took.items()}
    print(
        f"{name}: {len(pairs)} x {options.width} tokens, {torch.get_num_threads()} threads, median of {options.repeats}"
    )
    for job, seconds in medians.items():
        print(f"  {job:24} {seconds * 1e3:9.1f} ms   {seconds / medians['plain autograd']:.2f} x plain")
    return [
        {"model": name, "prompts": len(pairs), "width": options.width, "rules": job, "seconds": seconds,
         "ratio": seconds / medians["plain autograd"]}
        for job, seconds in medians.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="*", default=["mini-gpt2", "gpt2-small-shape"])
    parser.add_argument("--rules", nargs="*", default=list(RULES))
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = [row for name in options.model for row in measure(name, options)]
    if options.out is not None:
        about = {"machine": describe_machine(), "torch": torch.__version__}
        write_atomically(options.out, json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
