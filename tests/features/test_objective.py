"""Losses of sparse autoencoders: against the same losses through the dense code, left to autograd, and by hand."""

import math

import pytest
import torch
from torch import Tensor

from interp.features import activations
from interp.features import codes as codes_module
from interp.features.config import SPARSE, WITH_K, SAEConfig
from interp.features.objective import Outcome, objective
from interp.features.sae import SAE

N, D, H, D_OUT = 64, 16, 48, 10
DEAD = [3, 7, 20, 40, 41, 42, 44, 45, 46, 47]
KRON = (2, 4, 6)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(dtype: torch.dtype = torch.float64) -> Tensor:
    return normal(N, D, seed=1, dtype=dtype) + 0.3


def make(architecture: str, dtype: torch.dtype = torch.float64, *, transcoder: bool = False, **options) -> SAE:
    """An SAE none of whose parameters is 0 or of norm 1, not even where they ought to be: the loss does not rely on it."""
    elsewhere = {"d_out": D_OUT, "skip": True, "apply_b_dec_to_input": False} if transcoder else {}
    k = None if architecture == "top-afa" else 5
    sae = SAE(SAEConfig(architecture=architecture, d_in=D, d_sae=H, k=k, **elsewhere, **options), dtype=dtype)
    for seed, p in enumerate(sae.parameters()):
        p.add_(0.1 * normal(*p.shape, seed=seed, dtype=p.dtype)).requires_grad_()
    if architecture == "jumprelu":
        sae.threshold.data.abs_()  # as training keeps it
    return sae


def gradients(loss: Tensor, sae: SAE) -> dict[str, Tensor | None]:
    names = [name for name, _ in sae.named_parameters()]
    values = torch.autograd.grad(loss, list(sae.parameters()), allow_unused=True, retain_graph=True)
    return dict(zip(names, values, strict=True))


def agree(found: Tensor, expected: Tensor, sae: SAE, *, loss: float = 1e-12, gradient: float = 1e-10) -> None:
    """The same loss, relative to its size, and the same gradient of every parameter, relative to the largest."""
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=loss)
    mine, theirs = gradients(found, sae), gradients(expected, sae)
    for name, value in theirs.items():
        assert (mine[name] is None) == (value is None), name
        if value is not None:
            assert float((mine[name] - value).abs().max()) <= gradient * max(1.0, float(value.abs().max())), name


def pre_activations(sae: SAE, x: Tensor, encoder: Tensor | None = None) -> Tensor:
    seen = x if sae.b_in is None else x - sae.b_in
    if encoder is None:
        z = seen @ sae.encoder.T + sae.b_enc
    else:
        z = (seen.to(encoder.dtype) @ encoder.T).to(x.dtype) + sae.b_enc
    return z if sae.config.kron is None else sae.pair(z)


def dense_loss(sae: SAE, x: Tensor, y: Tensor, dead: Tensor | None, encoder: Tensor | None = None) -> Tensor:
    """The loss of the page, as a function of a dense code; only its places are taken as given."""
    c = sae.config
    z, n = pre_activations(sae, x), None if c.unit_decoder else sae.W_dec.norm(dim=1)
    ranked_by, rank = pre_activations(sae, x, encoder).detach(), None if n is None else n.detach()
    length = (x if sae.b_in is None else x - sae.b_in).norm(dim=1).detach()
    if c.architecture == "top-afa":
        chosen = activations.afa(ranked_by, length, rank, k_max=c.k_max)
    elif c.architecture in ("topk", "abstopk"):
        chosen = (activations.top_k if c.architecture == "topk" else activations.abs_top_k)(ranked_by, c.k, rank)
    else:
        chosen = activations.batch_top_k(ranked_by, c.k, rank)[0]
    f = (z if c.architecture == "abstopk" else z.relu()) * chosen.dense(torch.ones_like(chosen.values))
    loss, skip = 0.0, x @ sae.W_skip.T if c.skip else 0.0
    for width in c.levels:
        e = y - (f[:, :width] @ sae.W_dec[:width] + sae.b_dec + skip)
        loss = loss + e.square().sum() / N
    if c.architecture == "top-afa":
        sized = f if rank is None else f * rank
        loss = loss + c.afa_weight * D * (sized.norm(dim=1) - length).square().mean() + c.sparsity * sized.sum() / N
    if dead is not None:
        order = ranked_by[:, dead] if rank is None else ranked_by[:, dead] * rank[dead]
        strongest = torch.zeros_like(order).scatter(1, order.topk(min(c.n_aux, len(dead))).indices, 1.0)
        e = e.detach()
        left = ((z[:, dead].relu() * strongest) @ sae.W_dec[dead] - e).square().sum() / N
        loss = loss + c.aux_weight * left * (y - y.mean(0)).square().sum() / (e - e.mean(0)).square().sum()
    return loss


# -------------------------------------------------------------------------------------------- codes that are sparse


@pytest.mark.parametrize("below", [0, 1], ids=["dense products", "sparse products"])
@pytest.mark.parametrize("kron", [None, KRON], ids=["linear", "kron"])
@pytest.mark.parametrize("unit", [True, False], ids=["unit decoder", "free decoder"])
@pytest.mark.parametrize(
    ("architecture", "transcoder"),
    [(kind, False) for kind in sorted(SPARSE)] + [(kind, True) for kind in sorted(WITH_K)],
    ids=sorted(SPARSE) + [f"{kind} skip transcoder" for kind in sorted(WITH_K)],
)
def test_sparse_passes_equal_autograd_through_the_dense_code(architecture, unit, transcoder, kron, below, monkeypatch):
    monkeypatch.setattr(codes_module, "SPARSE_BELOW", below)
    for dtype, tolerance in ((torch.float64, (1e-12, 1e-10)), (torch.float32, (1e-5, 1e-5))):
        sae = make(architecture, dtype, transcoder=transcoder, unit_decoder=unit, kron=kron, sparsity=0.1, k_aux=3)
        x = inputs(dtype)
        y = normal(N, D_OUT, seed=2, dtype=dtype) if transcoder else x
        for dead in (None, torch.tensor(DEAD)):
            found, expected = objective(sae, x, y, dead=dead).loss, dense_loss(sae, x, y, dead)
            agree(found, expected, sae, loss=tolerance[0], gradient=tolerance[1])


@pytest.mark.parametrize("architecture", sorted(SPARSE))
def test_latents_may_be_chosen_in_bfloat16(architecture):
    """Other latents than full precision's (the copy is a bad one, to be sure), but of those the exact values and gradients."""
    sae, x, dead = make(architecture, sparsity=0.1, k_aux=3), inputs(), torch.tensor(DEAD)
    narrow = (sae.encoder.detach() + 0.05 * normal(H, D, seed=3)).bfloat16()
    found = objective(sae, x, x, dead=dead, encoder=narrow)
    agree(found.loss, dense_loss(sae, x, x, dead, narrow), sae)
    assert float(found.loss.detach()) != float(objective(sae, x, x, dead=dead).loss.detach())


def test_an_exact_copy_of_the_encoder_changes_nothing():
    sae, x = make("batchtopk", torch.float32), inputs(torch.float32)
    again = objective(sae, x, x, encoder=sae.encoder.detach().clone())
    agree(again.loss, objective(sae, x, x).loss, sae, loss=1e-6, gradient=1e-6)


@pytest.mark.parametrize("threshold", [0.01, 1.0, 100.0])
def test_the_running_threshold_only_saves_time(threshold):
    sae, x = make("batchtopk"), inputs()
    expected = objective(sae, x, x)
    sae.batch_threshold.fill_(threshold)
    agree(objective(sae, x, x).loss, expected.loss, sae)


def test_another_k_than_the_configs():
    sae, x = make("topk"), inputs()
    twelve = make("topk")
    twelve.config = SAEConfig(d_in=D, d_sae=H, k=12)
    assert float(objective(sae, x, x, k=12).loss.detach()) == float(objective(twelve, x, x).loss.detach())


@pytest.mark.parametrize("architecture", sorted(SPARSE) + ["standard", "gated", "jumprelu"])
def test_what_a_batch_said(architecture):
    sae, x = make(architecture), inputs()
    if "b_enc" in dict(sae.named_parameters()):
        sae.b_enc.data[:9] = -50.0  # of these none fires, but in absolute value
    out, names = objective(sae, x, x), dict(sae.named_parameters())
    assert out.loss.requires_grad
    assert not any(value.requires_grad for value in (out.fired, out.l0, out.error))
    if architecture in ("batchtopk", "matryoshka"):
        code, lowest = activations.batch_top_k(pre_activations(sae, x).detach(), 5)
        assert float(out.lowest) == float(lowest) == float(code.values.min())
        sae.batch_threshold.fill_(float(lowest) * (1 - 1e-12))
    else:
        assert out.lowest is None
    sae.requires_grad_(False)
    code = sae.codes(x)
    assert torch.equal(out.fired, code.fired())
    assert float(out.l0) == pytest.approx(code.l0())
    torch.testing.assert_close(out.error, x - sae(x))
    if architecture != "abstopk" and "b_enc" in names:
        assert not out.fired[:9].any()


@pytest.mark.parametrize("architecture", sorted(SPARSE) + ["standard", "gated", "jumprelu"])
@pytest.mark.parametrize("unit", [True, False], ids=["unit decoder", "free decoder"])
def test_losses_scale_with_the_square_of_the_data(architecture, unit):
    """With inputs and biases s times as large, so are codes and errors: AuxK's weight means the same on any data."""
    sae, x, dead = make(architecture, unit_decoder=unit), inputs(), torch.tensor(DEAD)
    dead = None if architecture == "jumprelu" else dead  # whose own term for them is linear
    before = float(objective(sae, x, x, dead=dead).loss.detach())
    for name, p in sae.named_parameters():
        if name.startswith("b_") or name == "threshold":
            p.data *= 4
    assert float(objective(sae, 4 * x, 4 * x, dead=dead).loss.detach()) == pytest.approx(16 * before, rel=1e-10)


# ------------------------------------------------------------------------------------------------------------- AuxK


def with_silent(architecture: str, **options) -> tuple[SAE, Tensor, Tensor, Outcome, Outcome]:
    """(sae, x, dead, outcome without AuxK, outcome with it), where the dead are all that do not fire."""
    sae, x = make(architecture, **options), inputs()
    sae.b_enc.data[20:40] -= 1.0
    sae.b_dec.data += 1.0
    without = objective(sae, x, x)
    dead = (~without.fired).nonzero()[:, 0]
    assert 8 <= len(dead) < H
    return sae, x, dead, without, objective(sae, x, x, dead=dead)


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("topk", {}), ("topk", {"unit_decoder": False}), ("batchtopk", {}), ("matryoshka", {"widths": (16, H)}),
        ("top-afa", {"k_max": 3}),
    ],
    ids=["topk", "free decoder", "batchtopk", "matryoshka", "corrected top-afa"],
)  # fmt: skip
def test_dead_latents_predict_the_residual_and_leave_the_living_alone(architecture, options):
    sae, x, dead, without, out = with_silent(architecture, k_aux=4, **options)
    alive = without.fired
    before, after = gradients(without.loss, sae), gradients(out.loss, sae)
    for name in ("W_dec", "encoder", "b_enc"):
        torch.testing.assert_close(after[name][alive], before[name][alive], rtol=1e-12, atol=1e-12)
        assert not before[name][dead].any(), "without it the dead learn nothing"
    assert after["W_dec"][dead].any()
    assert after["b_enc"][dead].any()
    # what they predict has no b_dec, which the residual has lost already
    z, n = pre_activations(sae, x).detach()[:, dead], 1.0 if sae.norms() is None else sae.norms().detach()[dead]
    order = (z * n).argsort(1, descending=True)[:, :4]
    guess = torch.stack([z[t, order[t]].relu() @ sae.W_dec.detach()[dead[order[t]]] for t in range(N)])
    left = (guess - without.error).square().sum() / (without.error - without.error.mean(0)).square().sum()
    expected = left * (x - x.mean(0)).square().sum(1).mean() / 32
    assert float((out.loss - without.loss).detach()) == pytest.approx(float(expected), rel=1e-9)


def test_the_published_top_afa_lets_the_living_follow():
    sae = make("top-afa", afa="faithful", k_aux=4)
    sae.W_dec.data *= 1.5  # a code of few
    x = inputs()
    without = objective(sae, x, x)
    dead = (~without.fired).nonzero()[:, 0]
    out = objective(sae, x, x, dead=dead)
    before, after = gradients(without.loss, sae), gradients(out.loss, sae)
    assert (after["W_dec"][without.fired] - before["W_dec"][without.fired]).abs().max() > 1e-4


def test_no_dead_latents_and_no_weight():
    sae, x = make("topk"), inputs()
    expected = float(objective(sae, x, x).loss.detach())
    assert float(objective(sae, x, x, dead=torch.tensor([], dtype=torch.int64)).loss.detach()) == expected
    silent = make("topk", aux_weight=0.0)
    assert float(objective(silent, x, x, dead=torch.tensor(DEAD)).loss.detach()) == expected


def test_a_perfect_reconstruction_has_no_residual_to_predict():
    sae, x = make("topk"), inputs()
    with torch.no_grad():
        sae.W_dec.zero_()
        sae.b_dec.copy_(x[0])
    out = objective(sae, x[:1].repeat(5, 1), x[:1].repeat(5, 1), dead=torch.tensor(DEAD))
    assert float(out.loss.detach()) == 0.0
    assert all(g is None or g.isfinite().all() for g in gradients(out.loss, sae).values())


# ------------------------------------------------------------------------------------------- the published top-AFA


@pytest.mark.parametrize("l1", [0.0, 0.01], ids=["as run", "with L1"])
def test_the_published_top_afa_from_end_to_end(l1):
    """Section by section as the published code has it, errors averaged over d: our loss is d times that one."""
    weight, k_aux = 1 / 16, 5
    sae = make("top-afa", afa="faithful", normalize="layer_norm", afa_weight=weight, k_aux=k_aux, sparsity=D * l1)
    raw, dead = 3 * inputs() + 2, torch.tensor(DEAD)
    mean, std = raw.mean(1, keepdim=True), raw.var(1, keepdim=True, unbiased=True).sqrt() + 1e-5
    x = (raw - mean) / std
    centred = x - sae.b_dec
    a = (centred @ sae.encoder.T).relu()  # b_enc is not 0 here, and unused
    target = centred.norm(dim=1)
    s, order = (a * sae.W_dec.norm(dim=1)).square().sort(dim=1, descending=True)
    sums = s.cumsum(1)
    sums[:, -1] = 1e8
    m = (sums.sqrt() - target[:, None]).abs().argmin(1) + 1
    assert len(m.unique()) > 3
    f = a * torch.zeros_like(a).scatter(1, order, (torch.arange(H) < m[:, None]).to(a))
    e = x - (f @ sae.W_dec + sae.b_dec)
    strongest = a[:, dead].topk(k_aux)
    guess = torch.zeros(N, len(dead), dtype=x.dtype).scatter(1, strongest.indices, strongest.values) @ sae.W_dec[dead]
    published = (
        e.square().mean()
        + l1 * f.abs().sum(1).mean()
        + (guess - e).square().mean() / 32
        + weight * (f.norm(dim=1) - x.norm(dim=1)).square().mean()
    )
    seen = sae.normalize(raw)[0]
    torch.testing.assert_close(seen, x, rtol=1e-12, atol=1e-12)
    out = objective(sae, seen, seen, dead=dead)
    assert gradients(out.loss, sae)["b_enc"] is None
    agree(out.loss, D * published, sae)
    sae.requires_grad_(False)
    assert torch.equal(sae.encode(raw) != 0, f != 0)
    torch.testing.assert_close(sae(raw), (x - e.detach()) * std + mean, rtol=1e-10, atol=1e-10)


# ----------------------------------------------------------------------------------------- codes that start dense


@pytest.mark.parametrize("transcoder", [False, True], ids=["autoencoder", "skip transcoder"])
@pytest.mark.parametrize("unit", [True, False], ids=["unit decoder", "free decoder"])
def test_standard(unit, transcoder):
    sae, x = make("standard", unit_decoder=unit, transcoder=transcoder, sparsity=0.3), inputs()
    y = normal(N, D_OUT, seed=2) if transcoder else x
    loss = 0.0
    for token, target in zip(x, y, strict=True):
        f = (sae.encoder @ (token if transcoder else token - sae.b_dec) + sae.b_enc).relu()
        xhat = f @ sae.W_dec + sae.b_dec + (sae.W_skip @ token if transcoder else 0)
        penalty = f.sum() if unit else (f * sae.W_dec.square().sum(1).sqrt()).sum()
        loss = loss + ((target - xhat).square().sum() + 0.5 * 0.3 * penalty) / N
    agree(objective(sae, x, y, sparsity=0.5).loss, loss, sae)


@pytest.mark.parametrize("transcoder", [False, True], ids=["autoencoder", "skip transcoder"])
@pytest.mark.parametrize("detach", [True, False], ids=["decoder detached", "decoder not detached"])
@pytest.mark.parametrize("unit", [True, False], ids=["unit decoder", "free decoder"])
def test_gated(unit, detach, transcoder):
    sae, x = make("gated", unit_decoder=unit, transcoder=transcoder, sparsity=0.3, detach_gate_decoder=detach), inputs()
    y, loss = normal(N, D_OUT, seed=2) if transcoder else x, 0.0
    frozen = [p.detach() if detach else p for p in (sae.W_dec, sae.b_dec)]
    for token, target in zip(x, y, strict=True):
        projected = sae.encoder @ (token if transcoder else token - sae.b_dec)
        gate, magnitude = projected + sae.b_gate, (projected * sae.r_mag.exp() + sae.b_mag).relu()
        f = torch.where(gate > 0, magnitude, 0.0)
        loss = (
            loss + (target - f @ sae.W_dec - sae.b_dec - (sae.W_skip @ token if transcoder else 0)).square().sum() / N
        )
        skip = (sae.W_skip.detach() if detach else sae.W_skip) @ token if transcoder else 0
        loss = loss + (target - gate.relu() @ frozen[0] - frozen[1] - skip).square().sum() / N
        loss = loss + 0.5 * 0.3 * (gate.relu() * (1.0 if unit else sae.W_dec.norm(dim=1))).sum() / N
    agree(objective(sae, x, y, sparsity=0.5).loss, loss, sae)


@pytest.mark.parametrize("target_l0", [None, 6.0], ids=["L0", "target L0"])
@pytest.mark.parametrize("some_dead", [False, True], ids=["all alive", "some dead"])
def test_jumprelu(target_l0, some_dead):
    """Loss and gradients written out: only those of the threshold are estimates."""
    sae, x = make("jumprelu", sparsity=0.3, target_l0=target_l0, bandwidth=0.5, aux_weight=0.2), inputs()
    dead, eps = torch.tensor(DEAD), 0.5
    with torch.no_grad():
        sae.threshold.copy_(torch.linspace(0.1, 0.9, H))
        theta, seen = sae.threshold.double(), x - sae.b_dec
        z = seen @ sae.encoder.T + sae.b_enc
        fires, near = (z > theta).double(), ((z - theta).abs() < eps / 2).double()
        f = z * fires
        e, l0 = x - f @ sae.W_dec - sae.b_dec, fires.sum(1).mean()
        penalty, slope = (l0, 1.0) if target_l0 is None else (2 / 6 * (l0 - 6) ** 2, 4 / 6 * float(l0 - 6))
        loss = e.square().sum() / N + 0.5 * 0.3 * penalty
        d_f = -2 / N * e @ sae.W_dec.T
        d_z = d_f * fires
        d_theta = (-(theta / eps) * d_f * near - 0.5 * 0.3 * slope / N * near / eps).sum(0)
        if some_dead:
            short = (theta - z).relu()[:, dead]
            loss = loss + 0.2 * short.sum() / N
            d_z[:, dead] -= 0.2 / N * (short > 0).double()
            d_theta[dead] += 0.2 / N * (short > 0).double().sum(0)
    out = objective(sae, x, x, sparsity=0.5, dead=dead if some_dead else None)
    assert float(out.loss.detach()) == pytest.approx(float(loss), rel=1e-12)
    g = gradients(out.loss, sae)
    close = {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(g["encoder"], d_z.T @ seen, **close)
    torch.testing.assert_close(g["b_enc"], d_z.sum(0), **close)
    torch.testing.assert_close(g["W_dec"], -2 / N * f.T @ e, **close)
    torch.testing.assert_close(g["b_dec"], -2 / N * e.sum(0) - d_z.sum(0) @ sae.encoder.detach(), **close)
    torch.testing.assert_close(g["threshold"], d_theta.float(), rtol=1e-5, atol=1e-6)  # kept in float32


def test_the_corrected_top_afa_is_trained_on_what_it_selects_by():
    """Where a code is one latent, |f| n against |x - b_dec|: worked out by hand."""
    config = SAEConfig(architecture="top-afa", d_in=2, d_sae=2, unit_decoder=False, afa_weight=0.5, sparsity=0.1)
    sae = SAE(config, dtype=torch.float64)
    weights = {"encoder": [[1.0, 0.0], [0.0, 1.0]], "W_dec": [[2.0, 0.0], [0.0, 1.0]], "b_dec": [1.0, 0.0]}
    for name, value in weights.items():
        getattr(sae, name).copy_(torch.tensor(value))
    x = torch.tensor([[4.0, -4.0]], dtype=torch.float64)  # x - b_dec = (3, -4), f = (3, 0), f n = 6
    error = (4 - 7) ** 2 + (-4) ** 2
    found = float(objective(sae, x, x).loss)
    assert found == pytest.approx(error + 0.5 * 2 * (6 - 5) ** 2 + 0.1 * 6)
    published = make_faithful(sae)
    found = float(objective(published, x, x).loss)
    assert found == pytest.approx(error + 0.5 * 2 * (3 - math.sqrt(32)) ** 2 + 0.1 * 3), "|f| against |x|"


def make_faithful(sae: SAE) -> SAE:
    options = {
        "architecture": "top-afa",
        "d_in": 2,
        "d_sae": 2,
        "unit_decoder": False,
        "afa_weight": 0.5,
        "sparsity": 0.1,
    }
    return SAE.of(SAEConfig(**options, afa="faithful"), {n: t.clone() for n, t in sae.state_dict().items()})
