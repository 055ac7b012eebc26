"""CUDA graphs for functions whose shapes repeat: many small launches replayed as one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

# What a graph can hand back: its own static buffers.
Outputs = TypeVar("Outputs", bound=Tensor | tuple[Tensor, ...])


@dataclass
class _Capture(Generic[Outputs]):
    graph: "torch.cuda.CUDAGraph"
    inputs: tuple[Tensor, ...]
    outputs: Outputs


class Graphed(Generic[Outputs]):
    """A function of tensors, replayed as a CUDA graph: one capture per signature (shapes and dtypes of its arguments).

    The first call with a signature runs the function `warmup` times on a side stream (Triton compiles, libraries choose
    their algorithms), then captures it; every call copies its arguments into the capture's buffers and replays it. On
    other devices a call is a plain call.

    The function must take tensors and return a tensor or a tuple of them; do the same work whatever the tensors hold
    (asking the device for a number stops the capture with torch's error); leave its arguments unchanged; and have no
    effect that must happen once per call, for it runs several times at first and then never again. Tensors and numbers
    that it takes from elsewhere are those of the capture: weights may change in place, not be replaced. No gradients.

    Args:
        function: what to replay.
        warmup: how often it runs before it is captured.
        clone: hand out copies. Otherwise what a call returns is overwritten by the next call with the same signature.
    """

    def __init__(self, function: Callable[..., Outputs], *, warmup: int = 3, clone: bool = False):
        if warmup < 1:
            raise ValueError(f"warmup is {warmup}; a function must run at least once before it is captured")
        self._function, self._warmup, self._clone = function, warmup, clone
        self._captures: dict[tuple, _Capture[Outputs]] = {}

    def __len__(self) -> int:
        """Number of signatures captured so far; each keeps the memory of all its intermediate values."""
        return len(self._captures)

    def __call__(self, *inputs: Tensor) -> Outputs:
        """The function's value at these tensors.

        Raises:
            ValueError: no tensor is given, they lie on several devices, or, on a CUDA device, one requires gradients.
            TypeError: the function returns something else than a tensor or a tuple of tensors.
        """
        devices = {x.device for x in inputs}
        if len(devices) != 1:
            raise ValueError(f"a graphed function takes tensors on one device, not on {len(devices)}")
        if not inputs[0].is_cuda:
            return _checked(self._function(*inputs))
        if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
            raise ValueError("a CUDA graph is replayed without gradients, and an argument requires them")
        signature = (inputs[0].device, *((x.shape, x.dtype) for x in inputs))
        capture = self._captures.get(signature)
        with torch.cuda.device_of(inputs[0]), torch.no_grad():
            if capture is None:
                capture = self._captures[signature] = self._captured(inputs)
            for static, x in zip(capture.inputs, inputs, strict=True):
                static.copy_(x)
            capture.graph.replay()
            return _cloned(capture.outputs) if self._clone else capture.outputs

    def _captured(self, inputs: tuple[Tensor, ...]) -> _Capture[Outputs]:
        static = tuple(x.clone() for x in inputs)
        # Not on the default stream: what is set up lazily there could not be captured.
        here, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(here)
        with torch.cuda.stream(side):
            for _ in range(self._warmup):
                _checked(self._function(*static))
        here.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = self._function(*static)
        return _Capture(graph, static, outputs)


def _checked(outputs: Any) -> Any:
    if not all(isinstance(x, Tensor) for x in (outputs if isinstance(outputs, tuple) else (outputs,))):
        raise TypeError(f"a graphed function returns a tensor or a tuple of tensors, not {outputs!r}")
    return outputs


def _cloned(outputs: Outputs) -> Outputs:
    return outputs.clone() if isinstance(outputs, Tensor) else tuple(x.clone() for x in outputs)
