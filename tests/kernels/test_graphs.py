"""Graphed functions: values of the plain function, one capture per signature, and plain calls without a CUDA device."""

import pytest
import torch

from interp_kernels import Graphed


def affine(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x * 2 + y, (x - y).relu()


def test_without_a_cuda_device_a_call_is_a_call():
    calls = []

    def function(x):
        calls.append(x)
        return x

    graphed, x = Graphed(function), torch.ones(3, requires_grad=True)
    assert graphed(x) is x
    assert graphed(x) is x
    assert len(calls) == 2
    assert len(graphed) == 0
    assert torch.equal(Graphed(affine)(x, x)[0], 3 * torch.ones(3))


def test_what_cannot_be_graphed_is_refused():
    x = torch.ones(2)
    with pytest.raises(ValueError, match="warmup is 0"):
        Graphed(affine, warmup=0)
    with pytest.raises(ValueError, match="not on 2"):
        Graphed(affine)(x, x.to("meta"))
    with pytest.raises(ValueError, match="not on 0"):
        Graphed(torch.ones)()
    with pytest.raises(TypeError, match="returns a tensor or a tuple of tensors"):
        Graphed(lambda x: (x, 2))(x)


@pytest.mark.gpu
def test_on_a_gpu_a_graph_says_what_the_function_says(gpu):
    graphed = Graphed(affine)
    for n in (3, 5, 3):
        for seed in range(3):
            x, y = torch.randn(2, n, generator=torch.Generator().manual_seed(seed)).to(gpu)
            for found, expected in zip(graphed(x, y), affine(x, y), strict=True):
                torch.testing.assert_close(found, expected)
    assert len(graphed) == 2


@pytest.mark.gpu
def test_on_a_gpu_the_next_call_overwrites_unless_told_to_clone(gpu):
    x, y = torch.ones(4, device=gpu), torch.zeros(4, device=gpu)
    for clone in (False, True):
        graphed = Graphed(affine, clone=clone)
        first = graphed(x, y)[0]
        graphed(y, y)
        assert torch.equal(first, 2 * x if clone else y)


@pytest.mark.gpu
def test_on_a_gpu_a_kernel_runs_in_a_graph(gpu):
    from interp_kernels import answer_logits

    resid, which = torch.randn(2, 6, 64, device=gpu), torch.tensor([0, 1] * 3, device=gpu)
    function = lambda x, d: answer_logits(x, d, which, norm="layer", eps=1e-5)  # noqa: E731
    graphed = Graphed(function)
    for x in resid:
        torch.testing.assert_close(graphed(x, resid[0]), function(x, resid[0]))


@pytest.mark.gpu
def test_on_a_gpu_gradients_are_refused(gpu):
    x = torch.ones(2, device=gpu, requires_grad=True)
    with pytest.raises(ValueError, match="an argument requires them"):
        Graphed(affine)(x, x)
    with torch.no_grad():
        Graphed(affine)(x, x)
