"""The sweep against plain hooks: every site, direction and family, joint and random interventions."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import interp.attend
from interp import PromptPairs, activation_patching, load_model, load_task
from interp.errors import OptionError, PatchError
from interp.exact import exact_scores
from interp.interventions import Patch
from interp.metrics import get_metric
from interp.sites import SITES
from interp.sweep import SweepRuns
from interp.tasks.corrupt import corrupt
from tests.families import FAMILIES, quiet
from tests.small_pairs import refused

CANONICAL = [name for name in FAMILIES if name != "falcon"]
METRICS = [get_metric("logit_diff"), get_metric("kl_divergence")]
WIDTH = 9


def pairs_of(n: int = 3) -> PromptPairs:
    """Prompts that differ from position 2 on in one and from 5 on in others, the last one padded."""
    generator = torch.Generator().manual_seed(0)
    clean = torch.randint(4, 60, (n, WIDTH), generator=generator)
    changed = clean.clone()
    changed[:, 5] = (clean[:, 5] + 7) % 56 + 4
    changed[0, 2] = (clean[0, 2] + 3) % 56 + 4
    lengths = torch.full((n,), WIDTH)
    lengths[-1] = WIDTH - 1
    answers = torch.arange(5, 5 + n)
    return PromptPairs(clean, changed, answers, answers + n, lengths=lengths)


def some_patch(rng: random.Random, site: str, cfg) -> Patch:
    position = rng.choice([None, *range(-3, WIDTH - 1)])
    cell = site == "pattern" and position is not None and rng.random() < 0.5
    n_units = SITES[site].n_units(cfg)
    unit = None if n_units is None or rng.random() < 0.3 else rng.randrange(n_units)
    return Patch(
        site, rng.randrange(cfg.n_layers), unit, position, rng.randrange(max(1, position + 1)) if cell else None
    )


def sites_of(cfg) -> list[str]:
    return [name for name in SITES if not (name == "resid_mid" and cfg.parallel)]


def both(model, pairs, interventions, **options):
    return tuple(
        exact_scores(model, pairs, interventions, metrics=METRICS, engine=engine, **options).patched
        for engine in ("sweep", "hooks")
    )


@pytest.mark.parametrize("base", ["clean", "corrupt"])
@pytest.mark.parametrize("family", CANONICAL)
def test_every_site_equals_hooks_in_float64(tiny, family, base):
    model, rng = tiny(family, torch.float64), random.Random(family + base)
    singles = [(some_patch(rng, site, model.cfg),) for site in sites_of(model.cfg) for _ in range(4)]
    joint = [
        tuple(some_patch(rng, rng.choice(sites_of(model.cfg)), model.cfg) for _ in range(rng.randrange(2, 6)))
        for _ in range(12)
    ]
    sweep, hooks = both(model, pairs_of(), singles + joint, base=base)
    torch.testing.assert_close(sweep, hooks, rtol=1e-10, atol=1e-10)
    assert (hooks - hooks[..., :1]).abs().max() > 0.01


@pytest.mark.parametrize("family", CANONICAL)
def test_float32_agrees_to_five_digits(tiny, family):
    model, rng = tiny(family, torch.float32), random.Random(family)
    interventions = [(some_patch(rng, site, model.cfg),) for site in sites_of(model.cfg) for _ in range(3)]
    sweep, hooks = both(model, pairs_of(), interventions, base="corrupt")
    assert (sweep - hooks).norm() <= 1e-5 * hooks.norm()


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6), n=st.integers(1, 12), family=st.sampled_from(["gpt2", "gemma3", "pythia", "mistral"])
)
def test_any_list_of_joint_interventions(tiny, seed, n, family):
    model, rng = tiny(family, torch.float64), random.Random(seed)
    interventions = [
        tuple(some_patch(rng, rng.choice(sites_of(model.cfg)), model.cfg) for _ in range(rng.randrange(1, 5)))
        for _ in range(n)
    ]
    sweep, hooks = both(model, pairs_of(), interventions, base=rng.choice(["clean", "corrupt"]))
    torch.testing.assert_close(sweep, hooks, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_interventions_on_one_layer_only(tiny, layer):
    """Nothing is on board when the layer begins: the last layer then has rows of one query and no others."""
    model = tiny("gpt2", torch.float64)
    for site in sites_of(model.cfg):
        interventions = [(Patch(site, layer, position=p),) for p in range(WIDTH)]
        sweep, hooks = both(model, pairs_of(), interventions, base="corrupt")
        torch.testing.assert_close(sweep, hooks, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("source", ["zero", "mean"])
def test_other_sources_of_values(tiny, source):
    model = tiny("llama3", torch.float64)
    interventions = [(Patch("head", 1, 2),), (Patch("mlp_out", 0, position=1), Patch("v", 2, 1)), ()]
    sweep, hooks = both(model, pairs_of(), interventions, base="clean", source=source)
    torch.testing.assert_close(sweep, hooks, rtol=1e-10, atol=1e-10)


def test_noise_on_embeddings(tiny):
    model = tiny("gpt2", torch.float64)
    noisy = corrupt(model, pairs_of(), "gaussian", seed=1)
    interventions = [(Patch("resid_pre", layer, position=p),) for layer in range(3) for p in range(WIDTH)]
    sweep, hooks = both(model, noisy, interventions, base="corrupt")
    torch.testing.assert_close(sweep, hooks, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_further_from_float32_than_with_hooks(dtype):
    def effects(dtype, engine):
        model = load_model("mini-gpt2", dtype=dtype)
        found = activation_patching(
            model, load_task("ioi", model, n=4), ["resid_pre", "head", "mlp_out"], engine=engine
        )
        return torch.cat([torch.from_numpy(array.values).float().flatten() for array in found.data_vars.values()])

    exact = effects(torch.float32, "hooks")
    off = {engine: float((effects(dtype, engine) - exact).norm() / exact.norm()) for engine in ("sweep", "hooks")}
    assert off["sweep"] < 1.5 * off["hooks"] < 0.05, off


@pytest.mark.parametrize("family", ["gpt2", "llama3", "gemma2", "gemma3", "pythia", "qwen3", "mistral"])
def test_attention_by_one_kernel_is_the_same(tiny, monkeypatch, family):
    """As on a GPU, where all rows' attention is one launch; here, by the kernel's torch reference."""
    model, rng = tiny(family, torch.float64), random.Random(family)
    interventions = [
        tuple(some_patch(rng, rng.choice(sites_of(model.cfg)), model.cfg) for _ in range(rng.randrange(1, 4)))
        for _ in range(40)
    ]
    launches = []
    kernel = interp.attend.kernel_suffix_attention
    monkeypatch.setattr(
        "interp.attend.kernel_suffix_attention", lambda *a, **k: (launches.append(1), kernel(*a, **k))[1]
    )
    monkeypatch.setattr("interp.walk.takes_kernels", lambda device: True)
    for chosen in (interventions, [i for i in interventions if all(p.site != "pattern" for p in i)]):
        sweep, hooks = both(model, pairs_of(), chosen, base="corrupt")
        torch.testing.assert_close(sweep, hooks, rtol=1e-10, atol=1e-10)
    assert len(launches) > model.cfg.n_layers


@pytest.mark.filterwarnings("ignore:.*is near zero")
def test_a_whole_grid_is_the_same_array(tiny):
    model, pairs = tiny("qwen3", torch.float64), pairs_of()
    for options in ({}, {"positions": "all"}, {"window": 2}, {"direction": "noise", "normalize": True}):
        sweep, hooks = (
            activation_patching(model, pairs, ["resid_pre", "head", "k"], engine=engine, **options)
            for engine in ("sweep", "hooks")
        )
        assert set(sweep.data_vars) == set(hooks.data_vars)
        for name in hooks.data_vars:
            assert sweep[name].dims == hooks[name].dims
            torch.testing.assert_close(
                *(torch.from_numpy(d[name].values) for d in (sweep, hooks)), rtol=1e-9, atol=1e-9, equal_nan=True
            )


@pytest.mark.filterwarnings("ignore:.*is near zero")
def test_what_cannot_change_is_exactly_zero(tiny):
    model, pairs = tiny("gpt2", torch.float32), pairs_of()
    effects = activation_patching(model, pairs, "resid_pre", engine="sweep")
    assert (effects[0, :, :2] == 0).all()
    assert (effects[1:, :, :5] == 0).all()
    same = PromptPairs(pairs.clean, pairs.clean, pairs.answers, pairs.wrong_answers)
    same = activation_patching(model, same, "head", engine="sweep")
    assert (same == 0).all()


@pytest.mark.filterwarnings("ignore:.*is near zero")
def test_the_whole_stream_gives_the_source(tiny):
    model = tiny("gemma2", torch.float64)
    effects = activation_patching(model, pairs_of(), "resid_pre", positions="all", engine="sweep", normalize=True)
    torch.testing.assert_close(torch.from_numpy(effects.values), torch.ones(3, 4, dtype=torch.float64))


def test_chunks_and_order_do_not_matter(tiny):
    model, pairs, rng = tiny("gpt2", torch.float64), pairs_of(), random.Random(0)
    interventions = [(some_patch(rng, site, model.cfg),) for site in sites_of(model.cfg) for _ in range(3)]

    def finals(order, **options):
        found = {}
        runs = SweepRuns(model, pairs, base="clean", sites=list(SITES), **options)
        for _, cells, prompts, resid in runs.run([interventions[i] for i in order], lambda resid, _: resid.clone()):
            for cell, prompt, row in zip(cells.tolist(), prompts.tolist(), resid, strict=True):
                found[order[cell], prompt] = row
        return found

    whole = finals(range(len(interventions)))
    shuffled = random.Random(1).sample(range(len(interventions)), len(interventions))
    for other in (finals(range(len(interventions)), max_memory=1), finals(shuffled, max_memory=200_000)):
        assert set(other) == set(whole)
        for key, row in whole.items():
            torch.testing.assert_close(other[key], row, rtol=1e-12, atol=1e-12)
    runs = SweepRuns(model, pairs, base="clean", sites=list(SITES), max_memory=1)
    assert len(list(runs.run(interventions, lambda resid, _: resid))) > 10


def test_a_model_with_hooks_of_its_own_is_refused(tiny):
    model = tiny("gpt2", torch.float32)
    with (
        model.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", lambda value, hook: value * 0)]),
        pytest.raises(PatchError, match=r"hook of its own at blocks\.1\.hook_resid_pre"),
    ):
        activation_patching(model, pairs_of(), "head", engine="sweep")


def test_a_bridge_is_refused_by_name(tiny_folder):
    from transformer_lens.model_bridge import TransformerBridge

    with quiet():
        bridge = TransformerBridge.boot_transformers(str(tiny_folder("gpt2")), device="cpu", dtype=torch.float32)
    with refused(OptionError, 'a TransformerBridge takes engine "hooks"'):
        SweepRuns(bridge, pairs_of(), base="clean", sites=["head"])
