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

STEPS = {"mini-gpt2": 8750, "mini-llama": 10_000}
RECIPE = {
    # (windows, tokens per window), taken in turn in the first and the second half of the main part. Attention circuits
    # form sooner where everything is near; the full context comes later, so that late positions are trained too.
    "first_half": [[48, 32]],
    "second_half": [[48, 32], [24, 64], [12, 128]],
    "learning_rate": 2e-3,
    "warmup": 200,
    # The last fifth of the steps starts again from this rate, on the final mixture of texts.
    "final_share": 0.2,
    "final_learning_rate": 8e-4,
    "weight_decay": 0.1,
}


def build_model(name: str, vocab_size: int) -> torch.nn.Module:
    """A fresh model; the caller seeds torch."""
    # No padding id: Llama would stop training the embedding of that token, and it is the one every text begins with.
    common = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None, "initializer_range": 0.05}
    if name == "mini-gpt2":
        no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        sizes = {"n_positions": 128, "n_embd": 128, "n_layer": 4, "n_head": 8}
        model = GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, **sizes, **no_dropout, **common))
    elif name == "mini-llama":
        sizes = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 5, "max_position_embeddings": 128}
        heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **sizes, **heads, **common))
    else:
        raise ValueError(f"there is no model {name!r}; choose {' or '.join(evaluate_mini.NAMES)}")
    initialise(model)
    return model


def initialise(model: torch.nn.Module) -> None:
    """Let token identity dominate the residual stream at first.

    With the libraries' initialisation (made for wide models) the random outputs of attention and MLPs are several
    times larger than embeddings of width 128. Later layers then hardly see which token is which, and copying takes
    thousands of steps to start. So: larger embeddings, smaller output projections.
    """
    is_tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    for name, parameter in model.named_parameters():
        if name.endswith(("wte.weight", "wpe.weight", "embed_tokens.weight")):
            # A tied embedding is the unembedding as well, where large values would make the first losses large.
            torch.nn.init.normal_(parameter, std=0.1 if is_tied else 0.5)
        elif name.endswith(("c_proj.weight", "o_proj.weight", "down_proj.weight")):
            torch.nn.init.normal_(parameter, std=0.005)


def build_optimizer(model: torch.nn.Module) -> torch.optim.AdamW:
    """AdamW; norms and biases do not decay."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": RECIPE["weight_decay"]},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=RECIPE["learning_rate"], betas=(0.9, 0.98))


def n_main(steps: int) -> int:
    """How many of the steps come before the final part."""
    return round(steps * (1 - RECIPE["final_share"]))


def learning_rate(step: int, steps: int) -> float:
    """In the main part: warm-up, the peak until 60 %, then straight down to a fiftieth. In the final part: straight down."""
    main = n_main(steps)
    if step >= main:
        return RECIPE["final_learning_rate"] * (0.02 + 0.98 * (steps - step) / (steps - main))
    warmup = min(RECIPE["warmup"], main // 5 + 1)
    left = (main - step) / (0.4 * main)
    return RECIPE["learning_rate"] * min(1.0, (step + 1) / warmup, 0.02 + 0.98 * left)


def window_shape(step: int, steps: int) -> tuple[int, int]:
    """Number and length of that step's windows."""
    shapes = RECIPE["first_half"] if step < n_main(steps) // 2 else RECIPE["second_half"]
    n_windows, length = shapes[step % len(shapes)]
    return n_windows, length


def weighted_loss(model: torch.nn.Module, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted mean over tokens of the next-token cross-entropy in nats; ids and weights are `[window, position]`."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    weights = weights[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()


def train_step(model, optimizer, tokenizer: Tokenizer, *, step: int, steps: int, seed: int) -> float:
    """One optimizer step on the windows of that step; returns the loss before it."""
    n_windows, length = window_shape(step, steps)
    ids, weights = corpus.batch(
        tokenizer, seed=seed, step=step, n_windows=n_windows, length=length, final=step >= n_main(steps)
    )
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
    # transformers 5 writes a class name that transformers 4 does not know; this one is known to both.
    config_file = temporary / "tokenizer_config.json"
    config = json.loads(config_file.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    config_file.write_text(json.dumps(config, indent=2) + "\n")
    (temporary / "model.safetensors").chmod(0o644)  # safetensors makes it readable by its owner only
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
    parser.add_argument("--steps", type=int, help="default: as many as the bundled model had")
    parser.add_argument("--out", type=Path, help="folder to write (default: data/models/<model>)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="more is faster, but then runs differ in the last bits")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--checkpoint-every", type=int, default=250)
    arguments = parser.parse_args()
    steps = arguments.steps or STEPS[arguments.model]
    out = (arguments.out or evaluate_mini.MODELS / arguments.model).resolve()
    checkpoints = out.with_name(out.name + ".training")

    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(arguments.seed)
    tokenizer = corpus.build_tokenizer()
    model = build_model(arguments.model, tokenizer.get_vocab_size())
    optimizer = build_optimizer(model)
    fixed = {"model": arguments.model, "steps": steps, "seed": arguments.seed, **RECIPE}
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
    for step in range(state["step"], steps):
        recent.append(train_step(model, optimizer, tokenizer, step=step, steps=steps, seed=arguments.seed))
        state |= {"step": step + 1, "seconds": before + time.monotonic() - begun}
        is_due = (step + 1) % arguments.checkpoint_every == 0 or step + 1 == steps
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
        if stop.asked and step + 1 < steps:
            print(f"Stopped after step {step + 1}; go on with --resume.", flush=True)
            return 130
    record = {**state, "minutes": round(state["seconds"] / 60), "torch": str(torch.__version__)}
    write_model(out, model, tokenizer, record)
    shutil.rmtree(checkpoints, ignore_errors=True)
    print(f"Wrote {out}. Measure it and write its card with evaluate_mini.py.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
