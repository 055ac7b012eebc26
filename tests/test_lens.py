"""Direct logit attribution adds up to the metric and is what the weights say; the lens is the model's own last step."""

import dataclasses

import numpy as np
import pytest
import torch
import xarray as xr

from interp.circuits.graph import writers
from interp.errors import MetricError, OptionError, UnsupportedModel
from interp.lens import direct_logit_attribution, logit_lens, run_strings
from interp.metrics import METRICS, Metric
from interp.model.run import record
from interp.rules import get_rules
from interp.tasks.corrupt import corrupt
from tests.families import FAMILIES
from tests.small_pairs import refused, small_pairs

ALL = [name for name in FAMILIES if name != "falcon"]  # which load_model refuses
PAIRS = small_pairs(n=3, lengths=[6, 4, 5])
RUNS = pytest.mark.parametrize("run", ["clean", "corrupt"])
OPTIONS = ({}, {"positions": True}, {"heads": False}, {"heads": False, "positions": True})


def metric_of(model, pairs, run: str, metric: str = "logit_diff") -> np.ndarray:
    with model.hooks(fwd_hooks=pairs.hooks(run)):
        return METRICS[metric](model(pairs.tokens(run), read_at=pairs.read_at), pairs).numpy()


# --------------------------------------------------------------------------------------------- direct logit attribution


@pytest.mark.parametrize("family", ALL)
def test_shares_add_up_to_the_metric(tiny, family):
    model = tiny(family, torch.float64)
    for run in ("clean", "corrupt"):
        expected = metric_of(model, PAIRS, run)
        for options in OPTIONS:
            shares = direct_logit_attribution(model, PAIRS, run=run, **options)
            np.testing.assert_array_equal(shares.metric.values, expected)
            np.testing.assert_allclose(shares.sum(shares.dims[1:]), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_other_metrics_and_several_answers(tiny, family):
    model = tiny(family, torch.float64)
    several = dataclasses.replace(PAIRS, answers=torch.tensor([[5, 9], [6, -1], [7, 8]]))
    shares = direct_logit_attribution(model, several, metric="answer_logit")
    np.testing.assert_allclose(shares.sum("node"), metric_of(model, several, "clean", "answer_logit"), atol=1e-12)
    mine = Metric("mine", "logits", lambda x, p, _: 2 * x[:, 7] - x[:, 3], linear=True)
    np.testing.assert_allclose(direct_logit_attribution(model, several, metric=mine).sum("node"),
                               mine(model(several.clean, read_at=several.read_at), several), atol=1e-12)  # fmt: skip


@RUNS
def test_what_the_weights_of_a_gpt2_say(tiny, run):
    model = tiny("gpt2", torch.float64)
    shares = direct_logit_attribution(model, PAIRS, run=run)
    by_source = direct_logit_attribution(model, PAIRS, run=run, positions=True)
    _, cache = model.run_with_cache(PAIRS.tokens(run))
    for row in range(3):
        end = int(PAIRS.lengths[row]) - 1
        unembed = model.W_U[:, PAIRS.answers[row, 0]] - model.W_U[:, PAIRS.wrong_answers[row, 0]]
        x = cache["blocks.2.hook_resid_post"][row, end]
        scale = ((x - x.mean()).square().mean() + model.cfg.eps).sqrt()
        direction = model.ln_final.w * unembed / scale
        direction = direction - direction.mean()
        worth = lambda write: float(write @ direction)  # noqa: B023, E731
        mine, bias = shares[row], float(model.ln_final.b @ unembed)
        embedded = cache["hook_embed"][row, end] + cache["hook_pos_embed"][row, end]
        assert mine.sel(node="input") == pytest.approx(worth(embedded), abs=1e-12)
        for layer, block in enumerate(model.blocks):
            bias += worth(block.attn.b_O)
            assert mine.sel(node=f"m{layer}") == pytest.approx(worth(cache["mlp_out", layer][row, end]), abs=1e-12)
            for head in range(model.cfg.n_heads):
                name, w_o = f"a{layer}.h{head}", block.attn.W_O[head]
                assert mine.sel(node=name) == pytest.approx(worth(cache["z", layer][row, end, head] @ w_o), abs=1e-12)
                for source in range(end + 1):
                    moved = cache["pattern", layer][row, head, end, source] * cache["v", layer][row, source, head]
                    found = by_source[row].sel(node=name, position=source)
                    assert found == pytest.approx(worth(moved @ w_o), abs=1e-12)
        assert mine.sel(node="bias") == pytest.approx(bias, abs=1e-12)


@pytest.mark.parametrize("family", ["gpt2", "llama3", "gemma2", "olmo2", "pythia", "phi", "gemma3"])
def test_it_is_relevance_by_frozen_norms_along_the_direct_path(tiny, family):
    """P8: activation times what frozen norms deliver at it, where nothing but the last norm and the post-norms is between."""
    model, at = tiny(family, torch.float64), (torch.arange(3), PAIRS.read_at)
    writes, starts = [], {}

    def start(value, hook):
        starts[hook.name] = value.detach().requires_grad_()
        return starts[hook.name]

    hooks = [("blocks.0.hook_resid_pre", start)]
    for layer in range(model.cfg.n_layers):
        hooks += [(f"blocks.{layer}.attn.hook_z", start), (f"blocks.{layer}.hook_mlp_out", start)]
        hooks += [(f"blocks.{layer}.hook_{x}_out", lambda value, hook: writes.append(value)) for x in ("attn", "mlp")]

    def only_directly(value, hook):
        first = starts["blocks.0.hook_resid_pre"]
        return value.detach() + sum(write - write.detach() for write in (first, *writes))

    hooks.append((f"blocks.{model.cfg.n_layers - 1}.hook_resid_post", only_directly))
    rules = get_rules("ln-only,cap_slope=ratio")
    logits = model.run_with_hooks(PAIRS.clean, rules=rules, read_at=PAIRS.read_at, fwd_hooks=hooks)
    gradients = torch.autograd.grad(METRICS["logit_diff"](logits, PAIRS).sum(), list(starts.values()))
    shares = direct_logit_attribution(model, PAIRS)
    for (name, value), g in zip(starts.items(), gradients, strict=True):
        relevance = (value * g)[at].sum(-1).detach().numpy()
        layer = name.split(".")[1]
        nodes = [f"a{layer}.h{h}" for h in range(model.cfg.n_heads)] if "hook_z" in name else [f"m{layer}"]
        nodes = ["input"] if name == "blocks.0.hook_resid_pre" else nodes
        np.testing.assert_allclose(shares.sel(node=nodes).values.squeeze(), relevance, rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", ["llama3", "gemma2", "olmo2"])
def test_positions_split_what_heads_write_and_nothing_else(tiny, family):
    model = tiny(family, torch.float64)
    whole, split = (direct_logit_attribution(model, PAIRS, positions=p) for p in (False, True))
    np.testing.assert_allclose(split.sum("position"), whole, rtol=0, atol=1e-12)
    assert split.dims == ("prompt", "node", "position")
    for row, length in enumerate((6, 4, 5)):
        assert split[row, :, length:].isnull().all()
        others = [node for node in split.node.values if ".h" not in str(node)]
        assert (split[row].sel(node=others)[:, : length - 1] == 0).all()
    by_layer = direct_logit_attribution(model, PAIRS, heads=False)
    assert by_layer.node.values[:3].tolist() == ["input", "a0", "m0"]
    for layer in range(model.cfg.n_layers):
        heads = [f"a{layer}.h{h}" for h in range(model.cfg.n_heads)]
        np.testing.assert_allclose(by_layer.sel(node=f"a{layer}"), whole.sel(node=heads).sum("node"), atol=1e-12)


def test_shares_say_what_they_are(tiny):
    model = tiny("gemma2")
    shares = direct_logit_attribution(model, PAIRS, run="corrupt", positions=True)
    assert shares.node.values.tolist() == [*writers(model.cfg), "bias"]
    a = shares.attrs
    assert (a["method"], a["metric"], a["unit"], a["run"]) == (
        "direct_logit_attribution", "logit_diff", "logits", "corrupt",
    )  # fmt: skip
    assert all(isinstance(value, str | int | float) for value in a.values())
    assert all(c.dtype != object for c in shares.coords.values())
    assert "all nodes add up" in a["sign"]
    np.testing.assert_allclose(shares.sum(("node", "position")), shares.metric, rtol=0, atol=1e-5)


def test_half_precision_adds_up_as_well_as_it_can(tiny):
    shares = direct_logit_attribution(tiny("llama3", torch.bfloat16), PAIRS, positions=True)
    assert shares.dtype == np.float32
    np.testing.assert_allclose(shares.sum(("node", "position")), shares.metric, rtol=0, atol=0.1)


# ------------------------------------------------------------------------------------------------------ the logit lens


@pytest.mark.parametrize("family", ALL)
def test_the_last_layer_is_the_model(tiny, family):
    model = tiny(family, torch.float64)
    for run in ("clean", "corrupt"):
        lens = logit_lens(model, PAIRS, run=run)
        assert lens.layer.values.tolist() == list(range(model.cfg.n_layers + 1))
        last = lens.isel(layer=-1).values[np.arange(3), PAIRS.read_at]
        np.testing.assert_allclose(last, metric_of(model, PAIRS, run), rtol=0, atol=1e-12)
        np.testing.assert_array_equal(lens.metric, metric_of(model, PAIRS, run))


@pytest.mark.parametrize("metric", ["logit_diff", "probability", "kl_divergence", "accuracy"])
@pytest.mark.parametrize("family", ["gpt2", "gemma2", "olmo2"])
def test_every_layer_is_read_by_the_models_own_norm_and_unembedding(tiny, family, metric):
    model = tiny(family, torch.float64)
    lens = logit_lens(model, PAIRS, metric=metric, run="corrupt", batch_size=2)
    clean = model(PAIRS.clean, read_at=PAIRS.read_at)
    names = [f"blocks.{layer}.hook_resid_pre" for layer in range(model.cfg.n_layers)]
    stream = record(model, PAIRS.corrupt, [*names, f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"])
    for layer, resid in enumerate(stream.values()):
        for position in range(6):
            there = PAIRS.lengths > position
            expected = METRICS[metric](model.unembed_resid(resid[:, position]), PAIRS, clean)
            expected = torch.where(there, expected, torch.nan)
            np.testing.assert_allclose(lens.sel(layer=layer, position=position), expected, rtol=0, atol=1e-12)


def test_the_clean_run_is_at_no_distance_from_itself(tiny):
    lens = logit_lens(tiny("llama3", torch.float64), PAIRS, metric="kl_divergence")
    np.testing.assert_allclose(lens.metric, 0, atol=1e-12)
    assert (lens.isel(layer=0).fillna(0) >= 0).all()


def test_labels_are_the_runs_own_tokens(tiny):
    model, plain = tiny("gpt2"), dataclasses.replace(PAIRS, token_strings=None)
    clean, other = logit_lens(model, PAIRS), logit_lens(model, PAIRS, run="corrupt")
    assert clean.token.values[0] == f"0:␣w{int(PAIRS.clean[0, 0])}*"
    texts = [model.to_str_tokens(row[:length]) for row, length in zip(PAIRS.corrupt, (6, 4, 5), strict=True)]
    assert [list(row) for row in run_strings(model, PAIRS, "corrupt")] == texts
    assert other.token.values[2] == f"2:{texts[0][2].replace(' ', '␣')}*"
    assert run_strings(model, PAIRS, "clean") == PAIRS.token_strings
    assert [list(row) for row in run_strings(model, plain, "clean")][1] == model.to_str_tokens(PAIRS.clean[1, :4])


@pytest.mark.parametrize("what", [direct_logit_attribution, logit_lens])
@pytest.mark.parametrize("run", ["clean", "corrupt"])
def test_batches_padding_and_noise(tiny, what, run):
    model = tiny("gpt2", torch.float64)
    pairs = corrupt(model, PAIRS, "gaussian", seed=1)
    together = what(model, pairs, run=run)
    np.testing.assert_allclose(together.metric, metric_of(model, pairs, run), atol=1e-12)
    xr.testing.assert_allclose(what(model, pairs, run=run, batch_size=2), together, rtol=1e-12)
    for row, length in enumerate((6, 4, 5)):
        one = pairs.take([row])
        cut = {name: getattr(one, name)[:, :length] for name in ("clean", "corrupt", "embedding_noise", "noise_mask")}
        alone = what(model, dataclasses.replace(one, **cut), run=run)
        mine = together[row].isel(position=slice(length)) if "position" in together.dims else together[row]
        np.testing.assert_allclose(mine, alone[0], rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("what", [direct_logit_attribution, logit_lens])
def test_what_cannot_be_read_is_said(tiny, what):
    model = tiny("gpt2")
    with refused(
        UnsupportedModel, r"needs a model's own layers, and a Linear has others: load the model with load_model"
    ):
        what(torch.nn.Linear(2, 2), PAIRS)
    with refused(OptionError, "'both' is not a run"):
        what(model, PAIRS, run="both")
    with pytest.raises(MetricError, match="needs wrong answers"):
        what(model, dataclasses.replace(PAIRS, wrong_answers=None))
    with pytest.raises(MetricError, match="did you mean 'logit_diff'"):
        what(model, PAIRS, metric="logitdiff")


@pytest.mark.parametrize("metric", ["probability", "kl_divergence", lambda logits: logits[:, 3]])
def test_only_a_linear_metric_can_be_shared_out(tiny, metric):
    with pytest.raises(MetricError, match=r"linear in the logits, such as logit_diff, which .* is not"):
        direct_logit_attribution(tiny("gpt2"), PAIRS, metric=metric)
