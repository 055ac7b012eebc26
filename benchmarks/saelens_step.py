"""SAELens' own trainer, a few steps at a time, for benchmarks/sae.py. Runs where SAELens is and imports nothing of ours."""

import json
import sys
import time

import torch
from safetensors.torch import load_file


def main() -> None:
    """Commands on standard input: version, run N, loss; answers on lines that begin with =."""
    import sae_lens
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    asked = json.loads(sys.argv[1])
    torch.set_num_threads(asked["threads"])
    data = load_file(asked["data"])
    torch.manual_seed(0)
    config = TopKTrainingSAEConfig(d_in=asked["d"], d_sae=asked["h"], k=asked["k"], device=asked["device"])
    trainer = SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=asked["steps"] * asked["batch"], train_batch_size_samples=asked["batch"], lr=asked["lr"],
            lr_end=asked["lr"], device=asked["device"], logger=LoggingConfig(log_to_wandb=False),
        ),
        sae=TopKTrainingSAE(config), data_provider=iter(()),
    )  # fmt: skip
    batches = iter([b.to(asked["device"]) for b in data["train"].split(asked["batch"])])
    on_gpu = torch.device(asked["device"]).type != "cpu"
    for line in sys.stdin:
        command, *rest = line.split()
        if command == "version":
            answer = sae_lens.__version__
        elif command == "run":
            turn = [next(batches) for _ in range(int(rest[0]))]
            start = time.perf_counter()
            for x in turn:
                trainer.step(x)
                trainer.n_training_steps += 1
            if on_gpu:
                torch.cuda.synchronize()
            answer = time.perf_counter() - start
        else:
            x = data["held_out"].to(asked["device"])
            trainer.sae.eval()
            with torch.no_grad():
                answer = float((x - trainer.sae(x)).square().sum(1).mean())
        print(f"={answer}", flush=True)


if __name__ == "__main__":
    main()
