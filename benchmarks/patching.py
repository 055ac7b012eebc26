"""Exact patching: interp's engines beside TransformerLens' own patching functions, in one process, on the same inputs.

    python benchmarks/patching.py                                    mini-gpt2: 8 x 16 tokens, 0 and 10 of them shared
    python benchmarks/patching.py --model gpt2-small-shape --peer-cells 24 --repeats 1
    python benchmarks/patching.py --width 64 --shared 0
    python benchmarks/patching.py --growth                           measured cost beside the formula's
    python benchmarks/patching.py --edges                            every edge of mini-gpt2
    python benchmarks/patching.py --device cuda --model pythia-1.4b-shape --out benchmarks/results/machine.json

The job is resid_pre + attn_out + mlp_out + every head, each at every position, denoising, logit difference. The peer's
functions are called as its documentation says, unmodified; with --peer-cells they are given that many cells of each site,
chosen at random, and their time is multiplied accordingly (they make one forward pass per cell). All sides are warmed up;
times are medians; that the numbers agree is checked before any time is printed. `of plain` is the FLOP/s that the sweep
achieves, as a share of those of a plain large-batch forward pass measured in the same run.
"""

import argparse
import ctypes
import json
import os
import platform
import statistics
import tempfile
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import torch

from benchmarks.machine import describe_machine
from interp import PromptPairs, activation_patching, bundled_models, edge_patching, load_model
from interp.circuits.exact import plan_edges
from interp.circuits.graph import edge_mask
from interp.files import write_atomically
from interp.model.load import quiet_libraries
from interp.sweep import flops_per_token

SITES = ("resid_pre", "attn_out", "mlp_out", "head")
AXES = {site: ["layer", "pos", *(["head"] if site == "head" else [])] for site in SITES}
SHAPES = ("gpt2-small-shape", "pythia-1.4b-shape")


def model_folder(name: str, scratch: Path) -> Path:
    """A bundled model's folder, or a random model of a published shape in the scratch folder."""
    bundled = bundled_models()
    if name in bundled:
        return bundled[name]
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    if name == "gpt2-small-shape":
        model = GPT2LMHeadModel(GPT2Config())  # 12 layers, d_model 768, vocabulary 50257
    else:
        sizes = {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 8192}
        model = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, vocab_size=50304))
    model.save_pretrained(scratch)
    AutoTokenizer.from_pretrained(bundled["mini-gpt2"]).save_pretrained(scratch)
    return scratch


def make_pairs(d_vocab: int, n: int, width: int, shared: int, device: str = "cpu") -> PromptPairs:
    """Random prompts whose first `shared` tokens are the same in the clean and the corrupt one."""
    generator = torch.Generator().manual_seed(0)
    clean, corrupt = torch.randint(d_vocab, (2, n, width), generator=generator)
    corrupt[:, :shared] = clean[:, :shared]
    corrupt[:, shared] = (clean[:, shared] + 1) % d_vocab
    return PromptPairs(*(x.to(device) for x in (clean, corrupt, torch.arange(n), torch.arange(n) + n)))


def cells_of(model, width: int, site: str, n: int | None) -> pd.DataFrame:
    """All cells of a site, or n of them."""
    sizes = [model.cfg.n_layers, width, model.cfg.n_heads][: len(AXES[site])]
    index = np.indices(sizes).reshape(len(sizes), -1).T
    if n is not None and n < len(index):
        index = index[np.sort(np.random.default_rng(0).choice(len(index), n, replace=False))]
    return pd.DataFrame(index, columns=AXES[site])


def peer(bridge, pairs: PromptPairs, cells: dict[str, pd.DataFrame]) -> dict[str, np.ndarray]:
    """Mean patched logit difference at some cells by TransformerLens' functions."""
    from transformer_lens import patching

    rows = torch.arange(len(pairs))

    def metric(logits):
        last = logits[:, -1]
        return (last[rows, pairs.answers[:, 0]] - last[rows, pairs.wrong_answers[:, 0]]).mean()

    _, cache = bridge.run_with_cache(pairs.clean)
    names = ("resid_pre", "attn_out", "mlp_out", "attn_head_out_by_pos")
    found = {}
    for site, name in zip(SITES, names, strict=True):
        function = getattr(patching, f"get_act_patch_{name}")
        values = function(bridge, pairs.corrupt, cache, metric, index_axis_names=None, index_df=cells[site])
        found[site] = values.cpu().numpy()
    return found


def ours(model, pairs: PromptPairs, engine: str, announce=None) -> dict[str, np.ndarray]:
    """Mean patched logit difference at all cells, as [layer, position] or [layer, position, head]."""
    effects = activation_patching(model, pairs, SITES, engine=engine, announce=announce)
    base = float(effects.metric_corrupt.mean())
    by_site = {site: effects["head_out" if site == "head" else site].mean("prompt") + base for site in SITES}
    by_site["head"] = by_site["head"].transpose("layer", "position", "head")
    return {site: array.values for site, array in by_site.items()}


def seconds(job, repeats: int) -> float:
    """Median time of a job that has run before."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        job()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def peak_bytes(job, device: str) -> int:
    """Memory that a job takes beside what is in use already: an accelerator's own count, or sampled resident size."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        job()
        return torch.cuda.max_memory_allocated() - before
    process, done, sizes = psutil.Process(), threading.Event(), []

    def sample() -> None:
        while not done.wait(0.002):
            sizes.append(process.memory_info().rss)

    if platform.system() == "Linux":
        ctypes.CDLL(None).malloc_trim(0)  # or what earlier jobs left behind would be used again and not be seen
    before = process.memory_info().rss
    thread = threading.Thread(target=sample)
    thread.start()
    job()
    done.set()
    thread.join()
    return max([*sizes, before]) - before


def plain_flops(model, width: int) -> float:
    """FLOP/s of the layers' matrices in a plain forward pass of 64 prompts, without the unembedding."""
    many = torch.randint(model.cfg.d_vocab, (64, width), device=model.device)
    run = lambda: model(many, return_type=None)  # noqa: E731
    run()
    return many.numel() * model.cfg.n_layers * sum(flops_per_token(model.cfg)) / seconds(run, 5)


def compare(options) -> list[dict]:
    """The table of one model: TransformerLens, hooks, sweep."""
    from transformer_lens.model_bridge import TransformerBridge

    results = []
    with tempfile.TemporaryDirectory() as scratch, quiet_libraries():
        folder = model_folder(options.model, Path(scratch))
        model = load_model(folder, device=options.device)
        bridge = TransformerBridge.boot_transformers(str(folder), device=options.device).eval()
    cells = {site: cells_of(model, options.width, site, options.peer_cells) for site in SITES}
    n_cells = sum(len(cells_of(model, options.width, site, None)) for site in SITES)
    some = n_cells / sum(map(len, cells.values()))
    print(
        f"{options.model}: {n_cells} cells on {options.prompts} x {options.width} tokens, {about(options)['machine']}"
    )
    if some > 1:
        print(f"transformer_lens: {n_cells / some:.0f} of the cells, time x {some:.2f}")
    print(f"{'shared':>6} {'engine':>16} {'seconds':>9} {'x peer':>7} {'cells/s':>9} {'of plain':>8} {'MiB':>7}")
    for shared in options.shared:
        pairs = make_pairs(model.cfg.d_vocab, options.prompts, options.width, shared, options.device)
        plans = []
        jobs = {
            "transformer_lens": lambda pairs=pairs: peer(bridge, pairs, cells),
            "interp hooks": lambda pairs=pairs: ours(model, pairs, "hooks"),
            "interp sweep": lambda pairs=pairs: ours(model, pairs, "sweep"),
        }
        if options.peer_cells:
            del jobs["interp hooks"]
        answers = {name: job() for name, job in jobs.items()}  # the warm-up
        for name in [name for name in jobs if name != "transformer_lens"]:
            for site in SITES:
                expected = answers["transformer_lens"][site].ravel()
                found = answers[name][site][tuple(cells[site].values.T)]
                np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max(), err_msg=name)
        ours(model, pairs, "sweep", announce=plans.append)
        print(f"{shared:>6} {plans[0]}")
        plain = plain_flops(model, options.width)
        took = {name: seconds(job, options.repeats) for name, job in jobs.items()}
        took["transformer_lens"] *= some
        for name, time_ in took.items():
            ratio, share = (
                took["transformer_lens"] / time_,
                plans[0].flops / time_ / plain if "sweep" in name else np.nan,
            )
            memory = peak_bytes(jobs[name], options.device) / 2**20
            print(
                f"{shared:>6} {name:>16} {time_:>9.4f} {ratio:>7.1f} {n_cells / time_:>9.0f} {share:>8.2f} {memory:>7.0f}"
            )
            results.append({
                "model": options.model, "prompts": options.prompts, "width": options.width, "shared": shared,
                "engine": name, "seconds": time_, "ratio": ratio, "cells": n_cells, "peer_cells": options.peer_cells,
                "share_of_plain": None if np.isnan(share) else share, "peak_mib": memory,
            })  # fmt: skip
    return results


def growth(options) -> list[dict]:
    """resid_pre sweeps of growing length and depth: measured time beside c S L(L-1)/2 + L (kv S + (c - kv) N)."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    results, first = [], None
    print(f"{'L':>3} {'T':>3} {'seconds':>9} {'measured':>9} {'formula':>9}   (relative to the first)")
    for n_layers, width in ((6, 16), (6, 32), (6, 64), (12, 16), (12, 32), (12, 64), (24, 16), (24, 32)):
        with tempfile.TemporaryDirectory() as scratch, quiet_libraries():
            torch.manual_seed(0)
            GPT2LMHeadModel(GPT2Config(n_layer=n_layers, n_embd=256, n_head=4)).save_pretrained(scratch)
            AutoTokenizer.from_pretrained(bundled_models()["mini-gpt2"]).save_pretrained(scratch)
            model = load_model(scratch, device=options.device)
        pairs = make_pairs(model.cfg.d_vocab, options.prompts, width, 0, options.device)
        job = lambda m=model, p=pairs: activation_patching(m, p, "resid_pre")  # noqa: E731
        job()
        c, kv, s = sum(flops_per_token(model.cfg)), flops_per_token(model.cfg)[1], width * (width + 1) / 2
        formula = c * s * n_layers * (n_layers - 1) / 2 + n_layers * (kv * s + (c - kv) * width)
        took = seconds(job, options.repeats)
        first = first or (took, formula)
        print(f"{n_layers:>3} {width:>3} {took:>9.3f} {took / first[0]:>9.2f} {formula / first[1]:>9.2f}")
        results.append({"layers": n_layers, "width": width, "seconds": took, "measured": took / first[0],
                        "formula": formula / first[1]})  # fmt: skip
    return results


def edges(options) -> list[dict]:
    """Every edge of a model's graph."""
    with tempfile.TemporaryDirectory() as scratch, quiet_libraries():
        model = load_model(model_folder(options.model, Path(scratch)), device=options.device)
    pairs = make_pairs(model.cfg.d_vocab, options.prompts, options.width, options.shared[0], options.device)
    plan = plan_edges(model, [pairs], edge_mask(model.cfg))
    print(f"{options.model}, all edges: {plan}")
    if options.plan:
        return []
    job = lambda: edge_patching(model, pairs)  # noqa: E731
    job()
    took = seconds(job, options.repeats)
    print(f"{took:.3f} s")
    return [{"model": options.model, "edges": plan.cells, "prompts": options.prompts, "width": options.width,
             "shared": options.shared[0], "seconds": took, "gflop": plan.flops / 1e9}]  # fmt: skip


def about(options) -> dict:
    return {"machine": describe_machine(options.device), "torch": torch.__version__}


def main() -> None:
    parser = argparse.ArgumentParser(description="exact patching beside TransformerLens")
    parser.add_argument("--model", default="mini-gpt2", help=f"a bundled model, or {', '.join(SHAPES)}")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--shared", type=int, nargs="+", default=[0, 10])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peer-cells", type=int, help="cells of each site given to the peer (default: all)")
    parser.add_argument("--growth", action="store_true", help="cost against the formula instead of the comparison")
    parser.add_argument("--edges", action="store_true", help="every edge of a model instead of the comparison")
    parser.add_argument("--plan", action="store_true", help="with --edges: say what it would do, and do not do it")
    parser.add_argument("--out", type=Path, help="JSON file to write; results are added to those in it")
    options = parser.parse_args()
    if options.model not in (*bundled_models(), *SHAPES):
        parser.error(f"no model {options.model}: one of {', '.join((*bundled_models(), *SHAPES))}")
    if options.model == "pythia-1.4b-shape" and options.device == "cpu":
        parser.error("pythia-1.4b-shape takes hours on a CPU: give a --device")
    os.environ["TQDM_DISABLE"] = "1"
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        kind, job = (
            ("growth", growth) if options.growth else ("edges", edges) if options.edges else ("comparison", compare)
        )
        results = job(options)
    if options.out:
        content = json.loads(options.out.read_text()) if options.out.exists() else about(options)
        content[kind] = content.get(kind, []) + results
        write_atomically(options.out, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
