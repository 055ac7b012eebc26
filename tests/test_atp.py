"""AtP*: the recomputed softmax against patched runs of the whole model, GradDrop against detached layers, one at a time."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
import xarray as xr

from interp import PromptPairs, activation_patching, attribution
from interp.atp import _of_keys, atp_star
from interp.errors import MetricError, OptionError, SiteError, UnsupportedModel
from interp.metrics import METRICS
from interp.model.run import record
from interp.sites import SITES
from tests.known_circuits.hand_built import END, SOURCE, Move, block, hand_built, swapped
from tests.small_pairs import NEURONS, refused, sites_of, small_pairs

# learned positions; GQA; q/k norm per head; soft-cap and window; adjacent rotation, parallel; window; q/k norm over all heads
FAMILIES = ("gpt2", "llama3", "qwen3", "gemma2", "gptj", "mistral", "olmo2")
PARTS = pytest.mark.parametrize("family", FAMILIES)
DIRECTIONS = pytest.mark.parametrize("direction", ["denoise", "noise"])
PAIRS = small_pairs(length=7, differ=(1, 3, 4), lengths=[7, 6], seed=2)


class ByHand:
    """Gradients and recomputed patterns of a base run, from hooks on whole forward passes."""

    def __init__(self, model, pairs: PromptPairs, direction: str, dropped: int | None = None):
        self.model, self.pairs, self.dropped = model, pairs, dropped
        base, source = ("corrupt", "clean") if direction == "denoise" else ("clean", "corrupt")
        self.tokens = pairs.tokens(base)
        names = [site.hook(layer) for site in self.sites for layer in range(model.cfg.n_layers)]
        self.base, self.source = record(model, self.tokens, names), record(model, pairs.tokens(source), names)
        self.gradients = self._gradients(names)

    @property
    def sites(self):
        return [SITES[name] for name in sites_of(self.model)]

    def _gradients(self, names) -> dict[str, torch.Tensor]:
        kept = {}

        def keep(value, hook):
            kept[hook.name] = value

        layer = self.dropped
        stops = () if layer is None else (f"blocks.{layer}.hook_attn_out", f"blocks.{layer}.hook_mlp_out")
        hooks = [("hook_embed", lambda value, hook: value.detach().requires_grad_()), *((name, keep) for name in names)]
        hooks += [(name, lambda value, hook: value.detach()) for name in stops]
        logits = self.model.run_with_hooks(self.tokens, read_at=self.pairs.read_at, fwd_hooks=hooks)
        value = METRICS["logit_diff"](logits, self.pairs).sum()
        found = torch.autograd.grad(value, list(kept.values()), allow_unused=True)
        return {name: torch.zeros_like(kept[name]) if g is None else g for name, g in zip(kept, found, strict=True)}

    def plain(self, name: str) -> torch.Tensor:
        """Gradient times change at a hook point, channel by channel."""
        return self.gradients[name] * (self.source[name] - self.base[name])

    def softmax(self, site: str, layer: int, unit: int, position: int) -> torch.Tensor:
        """[prompt]: the change of the whole pattern when one query or key is another, times its gradient."""
        name, pattern = SITES[site].hook(layer), SITES["pattern"].hook(layer)

        def put(value, hook):
            value = value.clone()
            value[:, position, unit] = self.source[name][:, position, unit]
            return value

        changed = record(self.model, self.tokens, [pattern], [(name, put)])[pattern]
        return ((changed - self.base[pattern]) * self.gradients[pattern]).sum((1, 2, 3))

    def all_softmax(self, site: str) -> np.ndarray:
        """[prompt, layer, unit, position], NaN at padding."""
        cfg, width = self.model.cfg, self.tokens.shape[1]
        found = [
            [[self.softmax(site, la, u, p) for p in range(width)] for u in range(SITES[site].n_units(cfg))]
            for la in range(cfg.n_layers)
        ]
        found = np.moveaxis(np.array([[[v.numpy() for v in row] for row in units] for units in found]), -1, 0)
        return np.where(self.pairs.is_token.numpy()[:, None, None], found, np.nan)


# --------------------------------------------------------------------------------------------------------- the QK fix


@PARTS
@DIRECTIONS
def test_queries_and_keys_are_what_a_recomputed_pattern_gives(tiny, family, direction):
    model = tiny(family, torch.float64)
    found = atp_star(model, PAIRS, ["q", "k"], direction=direction, grad_drop=False)
    by_hand = ByHand(model, PAIRS, direction)
    for site in ("q", "k"):
        expected = by_hand.all_softmax(site)
        assert np.nanmax(np.abs(expected)) > 1e-3
        np.testing.assert_allclose(found[site].values, expected, rtol=0, atol=1e-12)
        assert (found[site].sel(position=0) == 0).all()  # the prompts agree there


@PARTS
@pytest.mark.filterwarnings("ignore:.*near zero")
def test_a_small_difference_makes_it_the_gradient(tiny, family):
    model, pairs = tiny(family, torch.float64), small_pairs(seed=3)
    embedding = record(model, pairs.clean, ["hook_embed"])["hook_embed"]
    noise = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    errors = []
    for size in (1e-3, 1e-5):
        near = dataclasses.replace(
            pairs, corrupt=pairs.clean, embedding_noise=embedding + size * noise, noise_mask=pairs.is_token
        )
        exact, plain = atp_star(model, near, ["q", "k"], grad_drop=False), attribution(model, near, ["q", "k"])
        errors.append(max(float(abs(exact[x] - plain[x]).max() / abs(plain[x]).max()) for x in "qk"))
    assert errors[0] < 0.05
    assert errors[1] == pytest.approx(errors[0] / 100, rel=0.2)


def saturated(site: str) -> tuple:
    """A head whose score from END to SOURCE is +30 in the clean run and -30 in the corrupt one, because of its query or
    of its key; all other scores are 0. Attending there, it copies SOURCE's token."""
    model = hand_built([Move(1, 2, SOURCE, END)])
    q, k = (getattr(model.blocks[1].attn, f"W_{x}").data[2] for x in "QK")
    clean = torch.full((1, 6), 5)
    changing = END if site == "q" else SOURCE
    clean[0, SOURCE] = 4
    corrupt = clean.clone()
    clean[0, changing], corrupt[0, changing] = 2, 3
    matrix, size = (q, 1e4) if site == "q" else (k, 3e-3)
    k *= 3e-3 if site == "q" else 1
    matrix.zero_()
    matrix[block("token")][2, 0], matrix[block("token")][3, 0] = size, -size
    copied = {"q": 4, "k": 3}[site]
    return model, PromptPairs(clean, corrupt, torch.tensor([[copied]]), torch.tensor([[6]]))


@pytest.mark.parametrize("site", ["q", "k"])
@pytest.mark.filterwarnings("ignore:.*near zero")
def test_a_saturated_softmax_is_seen_through(site):
    model, pairs = saturated(site)
    exact = activation_patching(model, pairs, site)
    found = atp_star(model, pairs, site, grad_drop=False)
    np.testing.assert_allclose(found.values, exact.values, rtol=0, atol=1e-9)
    place = {"layer": 1, SITES[site].unit: 2, "position": END if site == "q" else SOURCE}
    assert abs(found.sel(place)).values == pytest.approx(1, abs=1e-9)
    assert float(abs(attribution(model, pairs, site)).max()) < 1e-9


def test_a_key_that_holds_all_attention_keeps_its_digits():
    """In float32 what the other keys have is below rounding of 1, and still decides what happens without that key."""
    generator = torch.Generator().manual_seed(0)
    before, after, g = (torch.randn(2, 3, 8, 8, generator=generator) for _ in range(3))
    before[..., 3], after[..., 3], after[..., 5] = before[..., 3] + 40, after[..., 3] - 40, after[..., 5] + 200
    masked = torch.ones(8, 8, dtype=torch.bool).triu(1)
    before, after = (x.masked_fill(masked, -torch.inf) for x in (before, after))
    found, exact = _of_keys(before, after, g), _of_keys(*(x.double() for x in (before, after, g)))
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    brute = torch.zeros_like(exact)
    for t in range(8):
        one = before.double().clone()
        one[..., t] = after[..., t]
        brute[..., t] = ((one.softmax(-1) - before.double().softmax(-1)) * g).sum((-1, -2))
    torch.testing.assert_close(exact, brute, rtol=1e-9, atol=1e-12)


# ----------------------------------------------------------------------------------------------------- signed, in place


@pytest.mark.parametrize("direction", ["denoise", "noise", "both"])
@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_elsewhere_it_is_attribution(tiny, family, direction):
    model, options = tiny(family), {"direction": direction, "neurons": NEURONS, "metric": ["logit_diff", "probability"]}
    sites = [site for site in sites_of(model) if site not in "qk"]
    for positions in ("each", "all", [0, -1]):
        found = atp_star(model, PAIRS, sites, positions=positions, grad_drop=False, **options)
        xr.testing.assert_equal(found, attribution(model, PAIRS, sites, positions=positions, **options))
    cells = {"positions": "cells", "direction": direction}
    found = atp_star(model, PAIRS, "pattern", grad_drop=False, **cells)
    xr.testing.assert_equal(found, attribution(model, PAIRS, "pattern", **cells))


@pytest.mark.parametrize("grad_drop", [False, True])
@pytest.mark.parametrize("family", ["llama3", "pythia"])
def test_the_layout_is_attributions(tiny, family, grad_drop):
    model, options = tiny(family), {"neurons": NEURONS, "normalize": True, "metric": ["logit_diff", "answer_logit"]}
    sites = sites_of(model)
    found, plain = (
        atp_star(model, PAIRS, sites, grad_drop=grad_drop, **options),
        attribution(model, PAIRS, sites, **options),
    )
    xr.testing.assert_equal(found.coords.to_dataset(), plain.coords.to_dataset())
    for name, array in plain.items():
        assert found[name].dims == array.dims
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name].isnull(), array.isnull())
    alone = atp_star(model, PAIRS, "q", grad_drop=grad_drop)
    assert alone.attrs["site"] == "q"
    same = {key: value for key, value in attribution(model, PAIRS, "q").attrs.items() if key in alone.attrs}
    changed = {"method"} | ({"sign"} if grad_drop else set())
    assert {key for key, value in same.items() if alone.attrs[key] != value} == changed


# ----------------------------------------------------------------------------------------------------------- GradDrop


@pytest.mark.parametrize("direction", ["denoise", "noise", "both"])
@pytest.mark.parametrize("family", ["gpt2", "pythia", "gemma2"])
def test_grad_drop_is_the_mean_size_over_detached_layers(tiny, family, direction):
    model = tiny(family, torch.float64)
    sites, n_layers = [*sites_of(model)[:4], "head", "v", "pattern", "neuron"], model.cfg.n_layers
    ways = ["denoise", "noise"] if direction == "both" else [direction]
    runs = [ByHand(model, PAIRS, way, layer) for way in ways for layer in range(n_layers)]
    found = {
        p: atp_star(model, PAIRS, sites, direction=direction, neurons=NEURONS, positions=p) for p in ("each", "all")
    }
    seen = PAIRS.is_token.numpy()
    for site in (SITES[name] for name in sites):
        for layer in range(n_layers):
            if site.name == "neuron":
                continue
            name = site.hook(layer)
            products = [run.plain(name) for run in runs]
            products = [p.sum(-1) if site.name == "pattern" else p.sum(-1).movedim(1, -1) for p in products]
            mine = {p: found[p][site.variable].sel(layer=layer).values for p in found}
            mask = seen if products[0].ndim == 2 else seen[:, None]
            each = sum(p.abs() for p in products).numpy() / (n_layers - 1) / len(ways)
            np.testing.assert_allclose(mine["each"], np.where(mask, each, np.nan), rtol=0, atol=1e-12)
            together = sum(abs((p.numpy() * mask).sum(-1)) for p in products) / (n_layers - 1) / len(ways)
            np.testing.assert_allclose(mine["all"], together, rtol=0, atol=1e-12)
    products = [run.plain(SITES["neuron"].hook(1))[..., 7] for run in runs]
    neuron = sum(p.abs() for p in products).numpy() / (n_layers - 1) / len(ways)
    mine = found["each"].neuron_out.sel(neuron="m1.n7").values
    np.testing.assert_allclose(mine, np.where(seen, neuron, np.nan), rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", ["qwen3", "gptj"])
def test_each_drop_has_its_own_gradient_at_the_pattern(tiny, family):
    model = tiny(family, torch.float64)
    n_layers, found = model.cfg.n_layers, atp_star(model, PAIRS, ["q", "k"])
    runs = [ByHand(model, PAIRS, "denoise", layer) for layer in range(n_layers)]
    for site in ("q", "k"):
        expected = sum(abs(run.all_softmax(site)) for run in runs) / (n_layers - 1)
        np.testing.assert_allclose(found[site].values, expected, rtol=0, atol=1e-12)


def test_several_metrics_share_the_passes(tiny):
    model, metrics = tiny("llama3", torch.float64), ["logit_diff", "probability", "answer_logit"]
    together = atp_star(model, PAIRS, ["head", "k"], metric=metrics)
    for metric in metrics:
        alone = atp_star(model, PAIRS, ["head", "k"], metric=metric)
        for name in ("head_out", "k"):
            np.testing.assert_array_equal(together[name].sel(metric=metric).values, alone[name].values)


def test_grad_drop_sees_a_path_that_another_cancels():
    """a0.h1 writes the answer to the logits, and to a head that takes it away again."""
    model = hand_built([Move(0, 1, SOURCE, END), Move(1, 0, END, END, reads="left")])
    one_hot = torch.eye(8, dtype=torch.float64)
    model.blocks[0].attn.W_O.data[1][:, block("left")] = one_hot
    model.blocks[1].attn.W_O.data[0][:, block("out")] = -one_hot
    pairs, place = swapped(), {"layer": 0, "head": 1, "position": END}
    with pytest.warns(UserWarning, match="near zero"):
        signed = atp_star(model, pairs, "head", grad_drop=False)
    with pytest.warns(UserWarning, match="near zero"):
        sizes = atp_star(model, pairs, "head")
    np.testing.assert_allclose(signed.sel(place), 0, atol=1e-9)
    np.testing.assert_allclose(sizes.sel(place), 2, atol=1e-9)


def test_sizes_stay_sizes_when_normalised(tiny):
    model = tiny("gpt2", torch.float64)
    plain, shares = (atp_star(model, PAIRS, "head", normalize=n) for n in (False, True))
    gap = abs(plain.metric_clean - plain.metric_corrupt)
    assert (plain.metric_clean < plain.metric_corrupt).any()
    xr.testing.assert_allclose(shares, plain / gap)
    for array in atp_star(model, PAIRS, ["q", "head"]).data_vars.values():
        assert (array.fillna(0) >= 0).all()
        assert array.attrs["aggregation"] == "mean absolute over dropped layers"
        assert array.attrs["sign"].startswith("none")


@pytest.mark.parametrize("grad_drop", [False, True])
def test_batches_and_company_change_nothing(tiny, grad_drop):
    model, pairs = tiny("gemma2", torch.float64), small_pairs(n=3, lengths=[6, 4, 5], seed=3)
    together, split = (
        atp_star(model, pairs, ["q", "k", "mlp_out"], grad_drop=grad_drop, batch_size=size) for size in (None, 2)
    )
    xr.testing.assert_allclose(together, split, rtol=1e-9, atol=1e-12)


def test_nothing_is_left_behind(tiny):
    model = tiny("gpt2")
    atp_star(model, PAIRS, ["q", "head"])
    assert not any(point.fwd_hooks or point.bwd_hooks for point in model.hook_dict.values())


# ------------------------------------------------------------------------------------------------------------- errors


def test_what_cannot_be_scored_is_said(tiny):
    model = tiny("gpt2")
    with refused(
        UnsupportedModel, r"AtP\* needs a model's own layers, and a Linear has others: load the model with load_model"
    ):
        atp_star(torch.nn.Linear(2, 2), PAIRS, "q")
    with pytest.raises(OptionError, match=r"hand-built has just one: use grad_drop=False"):
        atp_star(hand_built([], n_layers=1), swapped(), "q")
    with pytest.raises(MetricError, match=r"gradient of kl_divergence is zero in the clean run"):
        atp_star(model, PAIRS, "q", direction="noise", metric="kl_divergence")
    with refused(OptionError, r"'up' is not a direction"):
        atp_star(model, PAIRS, "q", direction="up")
    with pytest.raises(SiteError, match="no sites"):
        atp_star(model, PAIRS, [])


def test_a_model_that_is_nearly_one_hot_has_no_nan(tiny):
    model = copy.deepcopy(tiny("llama3"))
    for layer in model.blocks:
        layer.attn.W_Q.data *= 300
    found = atp_star(model, PAIRS, ["q", "k"])
    assert all(np.isfinite(array.values[np.broadcast_to(PAIRS.is_token[:, None, None], array.shape)]).all()
               for array in found.data_vars.values())  # fmt: skip
