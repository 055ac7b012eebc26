"""Which implementation a call takes, and what every kernel asks of its arguments."""

import math
import os
from importlib.util import find_spec
from typing import Literal, get_args

import torch
from torch import Tensor

Backend = Literal["auto", "triton", "torch"]


def takes_triton(backend: Backend, **tensors: Tensor | None) -> bool:
    """Whether a call with these tensors goes to Triton: under "auto", those on a CUDA device do.

    Raises:
        ValueError: no such backend; or Triton is to take tensors that it cannot read, or that need gradients.
        ImportError: Triton is to take them and is not installed.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend is one of {', '.join(get_args(Backend))}, not {backend!r}")
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    on_gpu = all(tensor.is_cuda for tensor in given.values())
    if backend == "torch" or (backend == "auto" and not on_gpu):
        return False
    if find_spec("triton") is None:
        raise ImportError('this needs the package triton, which is not installed; backend="torch" does without it')
    if not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            "Triton reads tensors on a CUDA device only, unless TRITON_INTERPRET=1 is set before its import"
        )
    needing = [name for name, tensor in given.items() if tensor.requires_grad]
    if torch.is_grad_enabled() and needing:
        raise ValueError(f'no kernel has a backward, and {needing[0]} requires gradients; backend="torch" has one')
    return True


def check_one_device(**tensors: Tensor | None) -> None:
    """Raise a ValueError that names two tensors on different devices, if there are two."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first_name, first = next(iter(given.items()))
    for name, tensor in given.items():
        if tensor.device != first.device:
            raise ValueError(f"{first_name} is on {first.device}, but {name} on {tensor.device}")


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype that statistics and sums of values of this dtype are kept in."""
    return torch.promote_types(dtype, torch.float32)


def alignment(*tensors: Tensor) -> int:
    """Bytes, up to 16, whose multiple the address of every innermost row of all these tensors is."""
    steps = [s * x.itemsize for x in tensors for s, n in zip(x.stride()[:-1], x.shape[:-1], strict=True) if n > 1]
    return math.gcd(16, *steps, *(x.data_ptr() for x in tensors))
