"""Where the kernels are tested: on a CUDA device where there is one, else in Triton's interpreter."""

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The accelerator if torch.cuda has one, else the CPU."""
    return torch.accelerator.current_accelerator() if torch.cuda.is_available() else torch.device("cpu")


@pytest.fixture(scope="session")
def gpu(device) -> torch.device:
    """The CUDA device; a test that asks for it is skipped without one."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return device


@pytest.fixture(params=["torch", "triton"])
def backend(request) -> str:
    """Both implementations in turn."""
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param
