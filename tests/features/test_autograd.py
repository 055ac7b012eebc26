"""Gradients through sparse codes are those of autograd through the dense code, to rounding."""

import pytest
import torch

from interp.features import codes as module
from interp.features.autograd import autoencode, decode
from interp.features.codes import Codes

N, D_IN, D_SAE, D_OUT = 20, 6, 15, 4
CLOSE = {"rtol": 1e-11, "atol": 1e-11}


@pytest.fixture(params=[0.0, 1.0], ids=["dense products", "sparse products"], autouse=True)
def below(request, monkeypatch) -> None:
    """Which products are used whatever the density is."""
    monkeypatch.setattr(module, "SPARSE_BELOW", request.param)


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weights(with_b_in: bool) -> dict[str, torch.Tensor]:
    shapes = {"encoder": (D_SAE, D_IN), "b_enc": (D_SAE,), "b_in": (D_IN,), "decoder": (D_SAE, D_OUT)}
    made = {name: normal(*shape, seed=seed).requires_grad_() for seed, (name, shape) in enumerate(shapes.items())}
    return made if with_b_in else {**made, "b_in": None}


def pre_activations(x: torch.Tensor, w: dict[str, torch.Tensor]) -> torch.Tensor:
    return (x if w["b_in"] is None else x - w["b_in"]) @ w["encoder"].T + w["b_enc"]


def choose(seed: int = 9) -> torch.Tensor:
    """Places at random, positive or not; the last token and the last latent have none."""
    mask = torch.rand(N, D_SAE, generator=torch.Generator().manual_seed(seed)) < 0.3
    mask[-1], mask[:, -1] = False, False
    return mask


def gradients(loss: torch.Tensor, w: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, [value for value in w.values() if value is not None]))


@pytest.mark.parametrize("with_b_in", [True, False], ids=["b_in", "no b_in"])
@pytest.mark.parametrize("rectified", [True, False], ids=["ReLU", "signed"])
@pytest.mark.parametrize("used", ["values", "decoded", "both"])
def test_autoencode(with_b_in, rectified, used):
    x, w, mask = normal(N, D_IN, seed=11), weights(with_b_in), choose()
    to_values, to_decoded = normal(N, D_SAE, seed=12), normal(N, D_OUT, seed=13)
    z = pre_activations(x, w)
    f = (z.relu() if rectified else z) * mask
    expected = 0.0
    codes = Codes.where(mask, f.detach())
    values, decoded = autoencode(codes, x, w["encoder"], w["b_enc"], w["b_in"], w["decoder"], rectified=rectified)
    torch.testing.assert_close(codes.dense(values.detach()), f.detach(), **CLOSE)
    torch.testing.assert_close(decoded, f @ w["decoder"], **CLOSE)
    loss = 0.0
    if used != "decoded":  # squared, so that what comes back depends on the values
        expected = expected + (f.square() * to_values).sum()
        loss = loss + (values.square() * to_values[codes.rows, codes.latents]).sum()
    if used != "values":
        expected = expected + ((f @ w["decoder"]).square() * to_decoded).sum()
        loss = loss + (decoded.square() * to_decoded).sum()
    if used == "values":
        w = {name: value for name, value in w.items() if name != "decoder"}
    for mine, autograd in zip(gradients(loss, w), gradients(expected, w), strict=True):
        torch.testing.assert_close(mine, autograd, **CLOSE)


def test_autoencode_of_nested_blocks():
    x, w, mask, edges = normal(N, D_IN, seed=11), weights(True), choose(), (2, 7, D_SAE)
    f = pre_activations(x, w).relu() * mask
    codes = Codes.where(mask, f.detach()).split(edges)
    _, decoded = autoencode(codes, x, w["encoder"], w["b_enc"], w["b_in"], w["decoder"])
    levels = decoded.unflatten(0, (3, N)).cumsum(0)
    nested = torch.stack([f[:, :width] @ w["decoder"][:width] for width in edges])
    torch.testing.assert_close(levels, nested, **CLOSE)
    to = normal(3, N, D_OUT, seed=13)
    for mine, autograd in zip(
        gradients((levels.square() * to).sum(), w), gradients((nested.square() * to).sum(), w), strict=True
    ):
        torch.testing.assert_close(mine, autograd, **CLOSE)


def test_decode():
    mask, f, decoder = (
        choose(),
        normal(N, D_SAE, seed=3).requires_grad_(),
        normal(D_SAE, D_OUT, seed=4).requires_grad_(),
    )
    codes, to = Codes.where(mask, torch.zeros(N, D_SAE, dtype=torch.float64)), normal(N, D_OUT, seed=5)
    decoded = decode(codes, f[codes.rows, codes.latents], decoder)
    dense = (f * mask) @ decoder
    torch.testing.assert_close(decoded, dense, **CLOSE)
    mine = torch.autograd.grad((decoded.square() * to).sum(), [f, decoder])
    autograd = torch.autograd.grad((dense.square() * to).sum(), [f, decoder])
    for a, b in zip(mine, autograd, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def test_gradients_by_finite_differences():
    x, w, mask = normal(N, D_IN, seed=11), weights(True), choose()

    def decoded(encoder, b_enc, b_in, decoder):
        z = (x - b_in) @ encoder.T + b_enc
        return autoencode(Codes.where(mask, z.detach()), x, encoder, b_enc, b_in, decoder, rectified=False)

    assert torch.autograd.gradcheck(decoded, tuple(w.values()), fast_mode=True)


def test_nothing_passes_where_the_ReLU_is_shut():
    x, w = normal(N, D_IN, seed=11), weights(True)
    z = pre_activations(x, w).detach()
    codes = Codes.where(z < 0, z.relu())
    values, decoded = autoencode(codes, x, w["encoder"], w["b_enc"], w["b_in"], w["decoder"])
    for gradient in gradients(values.sum() + decoded.sum(), w):
        assert not gradient.any()


def test_there_is_no_second_derivative():
    x, w = normal(N, D_IN, seed=11), weights(True)
    codes = Codes.where(choose(), pre_activations(x, w).detach().relu())
    _, decoded = autoencode(codes, x, w["encoder"], w["b_enc"], w["b_in"], w["decoder"])
    (first,) = torch.autograd.grad(decoded.square().sum(), w["decoder"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("with_b_in", [True, False], ids=["b_in", "no b_in"])
def test_the_residual_in_one_pass(with_b_in):
    """target - decoded - bias, and all gradients, equal what one subtracts by hand; a bias that is b_in too gets both parts."""
    x, w, target = normal(N, D_OUT, seed=11), weights(with_b_in), normal(N, D_OUT, seed=12)
    w["encoder"] = normal(D_SAE, D_OUT, seed=0).requires_grad_()
    w["b_in"] = normal(D_OUT, seed=2).requires_grad_() if with_b_in else None
    bias = w["b_in"] if with_b_in else normal(D_OUT, seed=3).requires_grad_()
    codes = Codes.where(choose(), pre_activations(x, w).relu().detach())
    given = (codes, x, w["encoder"], w["b_enc"], w["b_in"], w["decoder"])
    _, residual = autoencode(*given, bias=bias, target=target)
    _, decoded = autoencode(*given)
    torch.testing.assert_close(residual, target - decoded - bias, **CLOSE)
    wanted = [w["encoder"], w["b_enc"], w["decoder"], bias]
    found = torch.autograd.grad(residual.pow(3).sum(), wanted)
    expected = torch.autograd.grad((target - decoded - bias).pow(3).sum(), wanted)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)
