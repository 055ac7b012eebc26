"""Trains a bundled model on the generated corpus, on one CPU thread, and writes it as a Hugging Face folder.

    python data/train_mini.py --model mini-gpt2
    python data/train_mini.py --model mini-llama
    python data/train_mini.py --model mini-gpt2 --resume      go on after Ctrl-C or a crash

The same seed and one thread give the same weights on the same machine and library versions, and a resumed run gives
the same bits as an uninterrupted one: the data of a step depends on nothing but the seed and the step, the models
have no dropout, and a checkpoint holds the weights and both AdamW moments. Checkpoints stand in `<out>.training/`,
which is removed once the model is written.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import corpus
import evaluate_mini
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

RECIPE = {
    "n_windows": 32,
    "length": 48,
    # Every few steps as many tokens in windows of the full context, so that late positions are trained too.
    "long_every": 4,
    "n_long": 12,
    "long_length": 128,
    "learning_rate": 2e-3,
    "warmup": 200,
    "weight_decay": 0.1,
}


def build_model(name: str, vocab_size: int) -> torch.nn.Module:
    """A fresh model; the caller seeds torch."""
    # No padding id: Llama would stop training the embedding of that token, and it is the one every text begins with.
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    # The libraries' 0.02 suits wide models. At width 128 it leaves attention uniform and hardly any gradient on it.
    ends["initializer_range"] = 0.05
    if name == "mini-gpt2":
        no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        sizes = {"n_positions": 128, "n_embd": 128, "n_layer": 4, "n_head": 8}
        return GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, **sizes, **no_dropout, **ends))
    if name == "mini-llama":
        sizes = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 5, "max_position_embeddings": 128}
        heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
        return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **sizes, **heads, **ends))
    raise ValueError(f"there is no model {name!r}; choose {' or '.join(evaluate_mini.NAMES)}")


def build_optimizer(model: torch.nn.Module) -> torch.optim.AdamW:
    """AdamW; norms and biases do not decay."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": RECIPE["weight_decay"]},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=RECIPE["learning_rate"], betas=(0.9, 0.98))


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine from the peak to a tenth of it at the last step."""
    peak, warmup = RECIPE["learning_rate"], min(RECIPE["warmup"], steps // 5 + 1)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def weighted_loss(model: torch.nn.Module, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted mean over tokens of the next-token cross-entropy in nats; ids and weights are `[window, position]`."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    weights = weights[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()


def train_step(model, optimizer, tokenizer: Tokenizer, *, step: int, steps: int, seed: int) -> float:
    """One optimizer step on the windows of that step; returns the loss before it."""
    is_long = step % RECIPE["long_every"] == RECIPE["long_every"] - 1
    n_windows, length = (RECIPE["n_long" if is_long else "n_windows"], RECIPE["long_length" if is_long else "length"])
    ids, weights = corpus.batch(tokenizer, seed=seed, step=step, n_windows=n_windows, length=length)
    loss = weighted_loss(model, torch.tensor(ids), torch.tensor(weights))
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, steps)
    optimizer.step()
    return loss.item()


# ---------------------------------------------------------------- checkpoints


def save_checkpoint(folder: Path, model, optimizer, state: dict) -> None:
    """Write `folder/step-NNNNNN`, complete or not at all, and remove older ones."""
    final = folder / f"step-{state['step']:06d}"
    temporary = folder / (final.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    tensors = {}
    for name, parameter in model.named_parameters():  # tied weights come once
        tensors[f"weight:{name}"] = parameter.detach().contiguous()
        tensors |= {f"{key}:{name}": value for key, value in optimizer.state[parameter].items()}
    save_file(tensors, temporary / "state.safetensors")
    (temporary / "state.json").write_text(json.dumps(state, indent=2))
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
    for old in folder.glob("step-*"):
        if old != final:
            shutil.rmtree(old)


def load_checkpoint(folder: Path, model, optimizer, expected: dict) -> dict:
    """Put the newest checkpoint's tensors into model and optimizer; returns its state."""
    complete = sorted(path for path in folder.glob("step-*") if path.suffix != ".tmp")
    if not complete:
        raise SystemExit(f"There is no checkpoint in {folder} to resume from: start without --resume.")
    state = json.loads((complete[-1] / "state.json").read_text())
    for key, value in expected.items():
        if state[key] != value:
            raise SystemExit(
                f"The checkpoint was made with {key}={state[key]}, this run has {value}: "
                "resume with the same options and code, or start without --resume."
            )
    tensors = load_file(complete[-1] / "state.safetensors")
    for name, parameter in model.named_parameters():
        parameter.data.copy_(tensors[f"weight:{name}"])
        moments = ("step", "exp_avg", "exp_avg_sq")
        optimizer.state[parameter] = {key: tensors[f"{key}:{name}"].clone() for key in moments}
    return state


def write_model(out: Path, model, tokenizer: Tokenizer, record: dict) -> None:
    """Write the Hugging Face folder beside its place and move it there when it is complete."""
    temporary = out.with_name(out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    special = {"bos_token": corpus.END, "eos_token": corpus.END, "pad_token": corpus.END, "unk_token": corpus.UNKNOWN}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **special, clean_up_tokenization_spaces=False, model_max_length=128
    )
    fast.save_pretrained(temporary)
    (temporary / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    if (out / "README.md").exists():
        shutil.copy(out / "README.md", temporary)  # evaluate_mini.py brings it up to date
    shutil.rmtree(out, ignore_errors=True)
    os.replace(temporary, out)


# ---------------------------------------------------------------- main


class Stop:
    """Becomes true on Ctrl-C or SIGTERM, so that the loop ends between two steps, never inside one."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, *_: object) -> None:
        self.asked = True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, choices=evaluate_mini.NAMES)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--out", type=Path, help="folder to write (default: data/models/<model>)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="more is faster, but then runs differ in the last bits")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--checkpoint-every", type=int, default=250)
    arguments = parser.parse_args()
    out = (arguments.out or evaluate_mini.MODELS / arguments.model).resolve()
    checkpoints = out.with_name(out.name + ".training")

    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(arguments.seed)
    tokenizer = corpus.build_tokenizer()
    model = build_model(arguments.model, tokenizer.get_vocab_size())
    optimizer = build_optimizer(model)
    fixed = {"model": arguments.model, "steps": arguments.steps, "seed": arguments.seed, **RECIPE}
    state = {**fixed, "step": 0, "seconds": 0.0}
    if arguments.resume:
        state = load_checkpoint(checkpoints, model, optimizer, fixed)
    elif checkpoints.exists():
        raise SystemExit(f"{checkpoints} holds an unfinished run: add --resume to go on, or remove that folder.")

    held_out_tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=corpus.END, eos_token=corpus.END, unk_token=corpus.UNKNOWN
    )
    stop, begun, before = Stop(), time.monotonic(), state["seconds"]
    recent: list[float] = []
    for step in range(state["step"], arguments.steps):
        recent.append(train_step(model, optimizer, tokenizer, step=step, steps=arguments.steps, seed=arguments.seed))
        state |= {"step": step + 1, "seconds": before + time.monotonic() - begun}
        is_due = (step + 1) % arguments.checkpoint_every == 0 or step + 1 == arguments.steps
        if is_due or stop.asked:
            state["final_loss"] = round(sum(recent) / len(recent), 4)
            save_checkpoint(checkpoints, model, optimizer, state)
            recent.clear()
        if is_due:
            model.eval()
            figures = evaluate_mini.measure(model, held_out_tokenizer, n=60)
            model.train()
            short = " ".join(f"{key}={value:.3f}" for key, value in figures.items())
            print(f"step {step + 1} {state['seconds']:.0f}s loss={state['final_loss']} {short}", flush=True)
        if stop.asked and step + 1 < arguments.steps:
            print(f"Stopped after step {step + 1}; go on with --resume.", flush=True)
            return 130
    record = {**state, "minutes": round(state["seconds"] / 60), "torch": str(torch.__version__)}
    write_model(out, model, tokenizer, record)
    shutil.rmtree(checkpoints, ignore_errors=True)
    print(f"Wrote {out}. Measure it and write its card with evaluate_mini.py.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
