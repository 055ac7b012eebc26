"""What circuits cost: edge scores and faithfulness beside TransformerLens' own, all exact edges, and memory.

    python benchmarks/edges.py                                        print
    python benchmarks/edges.py --out benchmarks/results/edges.json    and write

On mini-gpt2 and IOI, float32; medians of `--repeats` runs after a warm one, both sides in one process.
- EAP and the faithfulness of one circuit of 50 edges, 8 pairs; TransformerLens takes one pair at a time.
- All exact edges of 32 pairs.
- Peak memory of EAP, by resident set size, beside what `interp.circuits.edges` says, on a random model of Llama's kind with 6
  layers of 16 heads, d_model 1024, 16 prompts of 15 tokens, for rules of one run and of two.
"""

import argparse
import json
import statistics
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.tools.analysis import attribution_patching as peer

from interp import (
    Circuit,
    ModelConfig,
    PromptPairs,
    Transformer,
    bundled_models,
    edge_patching,
    edge_scores,
    faithfulness,
    load_model,
    load_task,
)
from interp.circuits.edges import bytes_per_prompt
from interp.files import write_atomically
from interp.provenance import versions


def seconds(run: Callable[[], object], repeats: int) -> float:
    """Median time of a warm run."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def beside_the_peer(repeats: int) -> dict:
    """Seconds of both sides for the same work on the same pairs."""
    bridge = TransformerBridge.boot_transformers(str(bundled_models()["mini-gpt2"]), device="cpu", dtype=torch.float32)
    model = load_model("mini-gpt2")
    pairs = load_task("ioi", model, n=8)
    scores = edge_scores(model, pairs)
    circuit = Circuit.from_scores(scores, n_edges=50, prune=False)
    config = peer.EdgeAttributionConfig(granularity="edge")

    def metric_of(i: int) -> Callable:
        right, wrong = int(pairs.answers[i, 0]), int(pairs.wrong_answers[i, 0])
        return lambda logits: logits[0, -1, right] - logits[0, -1, wrong]

    def one(i: int) -> tuple:
        return bridge, pairs.clean[i : i + 1], pairs.corrupt[i : i + 1], metric_of(i)

    edges = peer.attribution_patch(*one(0), config=config).edge_scores
    readers = {"q_input": "<q>", "k_input": "<k>", "v_input": "<v>"}

    def name(node) -> str:
        if node.kind in ("embed", "logits"):
            return "input" if node.kind == "embed" else "logits"
        return f"m{node.layer}" if node.head is None else f"a{node.layer}.h{node.head}{readers.get(node.kind, '')}"

    wanted = set(circuit.edges)
    kept = [(u, v) for u, v in edges if f"{name(u)}->{name(v)}" in wanted]
    return {
        "eap_peer": seconds(lambda: [peer.attribution_patch(*one(i), config=config) for i in range(8)], repeats),
        "eap_ours": seconds(lambda: edge_scores(model, pairs), repeats),
        "faithfulness_peer": seconds(lambda: [peer.faithfulness(*one(i), kept) for i in range(8)], repeats),
        "faithfulness_ours": seconds(lambda: faithfulness(model, pairs, circuit), repeats),
    }


def exact(repeats: int) -> float:
    """All exact edges of mini-gpt2 on 32 IOI pairs."""
    model = load_model("mini-gpt2")
    pairs = load_task("ioi", model, n=32)
    return seconds(lambda: edge_patching(model, pairs), repeats)


def memory() -> dict[str, float]:
    """Peak over promise."""
    model = random_llama(n_layers=6, n_heads=16, d_model=1024)
    generator = torch.Generator().manual_seed(0)
    clean = torch.randint(0, 512, (16, 15), generator=generator)
    corrupt = clean.clone()
    corrupt[:, 3] = (corrupt[:, 3] + 1) % 512
    pairs = PromptPairs(clean, corrupt, torch.full((16, 1), 5), torch.full((16, 1), 6))
    promised = len(pairs) * bytes_per_prompt(model.cfg, 15, 1, 4)
    edge_scores(model, pairs.take(slice(1)))
    return {
        rules: _peak(lambda r=rules: edge_scores(model, pairs, rules=r)) / promised for rules in ("gradient", "secant")
    }


def _peak(run: Callable[[], object]) -> int:
    process, done = psutil.Process(), threading.Event()
    before = peak = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, process.memory_info().rss)
            time.sleep(0.002)

    thread = threading.Thread(target=watch)
    thread.start()
    run()
    done.set()
    thread.join()
    return peak - before


def random_llama(*, n_layers: int, n_heads: int, d_model: int, d_vocab: int = 512) -> Transformer:
    """Random weights; RMSNorm and gated MLPs, no positions."""
    generator, d_head, d_mlp = torch.Generator().manual_seed(0), d_model // n_heads, 2 * d_model
    draw = lambda *shape: 0.02 * torch.randn(shape, generator=generator)  # noqa: E731
    weights = {
        "embed.W_E": draw(d_vocab, d_model),
        "unembed.W_U": draw(d_model, d_vocab),
        "ln_final.w": torch.ones(d_model),
    }
    for layer in range(n_layers):
        block = {f"attn.W_{x}": draw(n_heads, d_model, d_head) for x in "QKV"}
        block |= {"attn.W_O": draw(n_heads, d_head, d_model), "mlp.W_in": draw(d_model, d_mlp),
                  "mlp.W_gate": draw(d_model, d_mlp), "mlp.W_out": draw(d_mlp, d_model)}  # fmt: skip
        block |= {"ln1.w": torch.ones(d_model), "ln2.w": torch.ones(d_model)}
        weights |= {f"blocks.{layer}.{name}": value for name, value in block.items()}
    cfg = ModelConfig(
        name="random", family="llama", n_layers=n_layers, d_model=d_model, n_heads=n_heads, n_kv_heads=n_heads, d_head=d_head,
        d_mlp=d_mlp, d_vocab=d_vocab, n_ctx=64, norm="rms", eps=1e-5, gated=True, activation="silu",
        attn_scale=(d_head**-0.5,) * n_layers, windows=(None,) * n_layers, rotary=(None,) * n_layers, prepend_bos=False,
    )  # fmt: skip
    return Transformer(cfg, weights)


def main() -> None:
    """Print; with --out, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    found = beside_the_peer(args.repeats)
    for what in ("eap", "faithfulness"):
        theirs, ours = found[f"{what}_peer"], found[f"{what}_ours"]
        print(f"{what}, 8 pairs: TransformerLens {theirs:.3f} s, interp {ours:.3f} s, {theirs / ours:.0f}x")
    found["exact_32_pairs"] = exact(args.repeats)
    print(f"all 1,519 exact edges, 32 pairs: {found['exact_32_pairs']:.2f} s")
    found["memory_over_promised"] = memory()
    shares = ", ".join(f"{share:.2f} ({rules})" for rules, share in found["memory_over_promised"].items())
    print(f"peak memory over what was promised: {shares}")
    if args.out:
        about = {"versions": versions(), "threads": torch.get_num_threads()}
        write_atomically(args.out, json.dumps({"about": about, **found}, indent=1))


if __name__ == "__main__":
    main()
