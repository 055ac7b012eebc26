"""How much memory training takes, said before it starts.

Of P parameters: weights, gradients and two moments (16 bytes each in float32), and a bfloat16 copy of the encoder where
it chooses latents. Of a batch of B tokens: the pre-activations of h latents (two copies: once ranked, once as they are),
five activations of d channels, and the codes. And the shuffle buffer.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import psutil
import torch

from interp.errors import OptionError
from interp.features.config import SPARSE, SAEConfig
from interp.features.sources import Source


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes, by purpose, at the peak of training."""

    weights: int
    batch: int
    buffer: int

    @property
    def total(self) -> int:
        """All of it, in bytes."""
        return self.weights + self.batch + self.buffer

    def __str__(self) -> str:
        return (
            f"training takes {_size(self.total)} at its peak: weights, gradients and moments {_size(self.weights)}, "
            f"a batch {_size(self.batch)}, the shuffle buffer {_size(self.buffer)}"
        )

    def check(self, device: torch.device | str | None, limit: int | None) -> None:
        """Raise `OptionError` if that is more than `limit`, or than what is free."""
        if limit is None:
            on_gpu = device is not None and torch.device(device).type != "cpu"
            limit = torch.cuda.mem_get_info(device)[0] if on_gpu else psutil.virtual_memory().available
        if self.total > limit:
            raise OptionError(f"{self}, and there is {_size(limit)}: take a smaller batch_size, buffer or d_sae")


def _size(n: int) -> str:
    return f"{n / 2**30:.1f} GiB" if n >= 2**30 else f"{n / 2**20:.0f} MiB"


def plan_memory(
    configs: Mapping[str, SAEConfig], batch_size: int, source: Source, buffer: int, encoder_dtype: str = "float32"
) -> MemoryPlan:
    """The peak of training these SAEs together: all their weights, and the largest one's batch, since they step in turn."""
    weights, batch = 0, 0
    for config in configs.values():
        n_pre = config.d_sae if config.kron is None else config.kron[0] * sum(config.kron[1:])
        encoder = n_pre * config.d_in
        weights += 16 * (encoder + config.d_sae * config.out + (config.d_in * config.out if config.skip else 0))
        weights += 2 * encoder if encoder_dtype == "bfloat16" else 0
        sparse = config.architecture in SPARSE
        per_token = 4 * (2 if sparse else 6) * config.d_sae + 20 * (config.d_in + config.out * len(config.levels))
        batch = max(batch, batch_size * per_token)
    of_sequence = source.rows_per_sequence
    rows = min(source.n_sequences, -(-max(buffer, batch_size) // of_sequence)) * of_sequence
    return MemoryPlan(weights, batch, 4 * rows * sum(source.widths.values()))
