"""Identities that exact patching must satisfy whatever the model: see `interp.patching` for the definitions."""

import dataclasses

import numpy as np
import pytest
import torch
import xarray as xr

from interp import Transformer, activation_patching, corrupt
from interp.errors import MetricError, OptionError, PatchError, SiteError, TaskError
from interp.grids import position_labels, visible
from interp.interventions import Patch, PatchedRuns
from interp.metrics import METRICS, Metric
from interp.patching import patch_nodes
from tests.small_pairs import NEURONS, refused, sites_of, small_pairs, with_other_padding

# learned positions; GQA with scaled rotary; post-norms, soft-caps and windows; post-norm only; parallel
FAMILIES = ("gpt2", "llama3", "gemma2", "olmo2", "pythia")
DIRECTIONS = ("denoise", "noise")
PARTS = pytest.mark.parametrize("family", FAMILIES)


def patching(model, pairs, sites, **options):
    """By hooks, whose identities hold to the last bit; that the sweep agrees is tests/test_sweep.py's matter."""
    return activation_patching(model, pairs, sites, **{"neurons": NEURONS, "engine": "hooks", **options})


def everything(model, pairs, **options) -> xr.Dataset:
    return patching(model, pairs, sites_of(model), **options)


def gap(array) -> xr.DataArray:
    return array.metric_clean - array.metric_corrupt


def zero_or_padding(array) -> bool:
    return bool((array.fillna(0) == 0).all())


@PARTS
def test_a_self_patch_changes_nothing(tiny, family):
    pairs = small_pairs(length=4, lengths=[4, 3])
    pairs = dataclasses.replace(pairs, corrupt=pairs.clean)
    with pytest.warns(UserWarning, match=r"near zero on prompts 0, 1"):
        effects = everything(tiny(family), pairs)
    with pytest.warns(UserWarning, match="near zero"):
        cells = patching(tiny(family), pairs, "pattern", positions="cells")
    assert all(map(zero_or_padding, [*effects.data_vars.values(), cells]))


@PARTS
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_whole_residual_stream_gives_the_source(tiny, family, direction):
    effects = patching(tiny(family), small_pairs(), "resid_pre", positions="all", direction=direction)
    target = gap(effects) * (1 if direction == "denoise" else -1)
    assert (effects == target).all()


@PARTS
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_nothing_happens_before_the_first_difference(tiny, family, direction):
    effects = everything(tiny(family), small_pairs(length=5, differ=(2,)), direction=direction, positions=[0, 1, 2, 4])
    for array in effects.data_vars.values():
        assert (array.sel(position=[0, 1]) == 0).all()
    assert (effects.attn_out.isel(layer=0).sel(position=2) != 0).any()


@PARTS
def test_one_differing_token_carries_the_whole_gap(tiny, family):
    effects = patching(tiny(family), small_pairs(differ=(2,)), "resid_pre").isel(layer=0)
    assert (effects.sel(position=2) == gap(effects)).all()
    assert (effects.drop_sel(position=2) == 0).all()


@PARTS
def test_all_heads_together_are_the_attention_output(tiny, family):
    model, pairs = tiny(family, torch.float64), small_pairs(n=1)
    runs = PatchedRuns(model, pairs, base="corrupt", sites=["head", "attn_out"])
    for layer in range(model.cfg.n_layers):
        for position in (3, 5):
            heads = tuple(Patch("head", layer, h, position) for h in range(model.cfg.n_heads))
            whole = runs.patched((Patch("attn_out", layer, None, position),))
            torch.testing.assert_close(runs.patched(heads), whole, rtol=0, atol=1e-10)


@PARTS
def test_all_pattern_cells_of_a_row_are_the_row(tiny, family):
    runs = PatchedRuns(tiny(family, torch.float64), small_pairs(n=1), base="clean", sites=["pattern"])
    row = runs.patched((Patch("pattern", 1, 2, 4),))
    cells = runs.patched(tuple(Patch("pattern", 1, 2, 4, key) for key in range(6)))
    torch.testing.assert_close(cells, row, rtol=0, atol=0)


@PARTS
def test_the_last_residual_acts_only_where_it_is_read(tiny, family):
    pairs = small_pairs(lengths=[6, 5], seed=1)
    effects = patching(tiny(family), pairs, "resid_post", normalize=True).isel(layer=-1)
    for row, length in enumerate((6, 5)):
        assert effects[row, length - 1] == pytest.approx(1, abs=1e-6)
        assert zero_or_padding(effects[row].isel(position=[p for p in range(6) if p != length - 1]))


@pytest.mark.parametrize("family", ["llama3", "gemma2"])
def test_batches_order_and_company_change_nothing(tiny, family):
    model, pairs = tiny(family, torch.float64), small_pairs(n=3, length=5, lengths=[5, 4, 5], seed=3)
    together = patching(model, pairs, ["resid_pre", "head", "mlp_out", "k", "v", "neuron"])
    for name, array in patching(model, pairs, ["resid_pre", "k", "neuron"], batch_size=2).data_vars.items():
        xr.testing.assert_allclose(array, together[name], rtol=1e-9, atol=1e-12)
    order = [2, 0, 1]
    moved = patching(model, pairs.take(order), ["mlp_out", "v"], batch_size=1)
    for name, array in moved.data_vars.items():
        np.testing.assert_allclose(array.values, together[name].values[order], rtol=1e-9, atol=1e-12)
    for site, name in (("k", "k"), ("neuron", "neuron_out")):
        np.testing.assert_array_equal(patching(model, pairs, site).values, together[name].values)


@pytest.mark.parametrize("family", ["llama3", "gpt_neo"])
@pytest.mark.parametrize("positions", ["each", "all", "cells", [0, -1, -2]], ids=str)
def test_a_padded_batch_is_its_prompts_one_by_one(tiny, family, positions):
    model, pairs = tiny(family, torch.float64), small_pairs(n=2, length=5, lengths=[3, 5], differ=(1, 2), seed=4)
    sites = ["pattern"] if positions == "cells" else ["resid_pre", "v", "pattern"]
    together = patching(model, pairs, [*sites, "resid_post"] if positions != "cells" else sites, positions=positions)
    arrays = [together] if positions == "cells" else list(together.data_vars.values())
    for row, length in enumerate((3, 5)):
        alone = dataclasses.replace(
            pairs.take([row]), clean=pairs.clean[[row], :length], corrupt=pairs.corrupt[[row], :length]
        )
        for array in arrays:
            single = patching(model, alone, array.attrs["site"], positions=positions)[0]
            mine = array[row]
            if positions in ("each", "cells"):
                beyond = mine.sel(position=slice(length, None))
                assert beyond.isnull().all(), f"padding of {array.attrs['site']} is a number"
                mine = mine.sel(position=slice(0, length - 1))
            if positions == "cells":
                assert mine.sel(source=slice(length, None)).isnull().all()
                mine = mine.sel(source=slice(0, length - 1))
            np.testing.assert_allclose(mine.values, single.values, rtol=1e-9, atol=1e-12)


def test_what_the_padding_holds_changes_nothing(tiny):
    pairs = small_pairs(n=2, lengths=[4, 6], seed=4)
    other = with_other_padding(pairs)
    sites = ["resid_pre", "head", "pattern"]
    assert patching(tiny("llama3"), pairs, sites).equals(patching(tiny("llama3"), other, sites))


def test_negative_positions_count_from_each_prompts_end(tiny):
    pairs = small_pairs(n=2, lengths=[4, 6], differ=(1, 2), seed=4)
    ends = patching(tiny("gpt2"), pairs, ["resid_mid", "pattern", "neuron"], positions=[-1, -3])
    each = patching(tiny("gpt2"), pairs, ["resid_mid", "pattern", "neuron"])
    for name, array in ends.data_vars.items():
        for row, length in enumerate((4, 6)):
            for p in (-1, -3):
                np.testing.assert_array_equal(
                    array[row].sel(position=p), each[name][row].sel(position=length + p), err_msg=name
                )
    assert ends.position.values.tolist() == [-1, -3]


@PARTS
def test_windows(tiny, family):
    model, pairs = tiny(family), small_pairs()
    single = patching(model, pairs, "mlp_out")
    one = patching(model, pairs, "mlp_out", window=1)
    assert one.equals(single)
    found = patching(model, pairs, "mlp_out", window=2)
    assert set(found) == {"mlp_out", "mlp_out_summed"}
    assert found.layer.values.tolist() == list(range(model.cfg.n_layers - 1))
    sums = single.values[:, :-1] + single.values[:, 1:]
    np.testing.assert_allclose(found.mlp_out_summed.values, sums, rtol=1e-5, atol=1e-7)
    runs = PatchedRuns(model, pairs, base="corrupt", sites=["mlp_out"])
    joint = runs.patched((Patch("mlp_out", 1, position=3), Patch("mlp_out", 2, position=3)))
    score = METRICS["logit_diff"](joint, pairs) - METRICS["logit_diff"](runs.plain("corrupt"), pairs)
    np.testing.assert_array_equal(found.mlp_out.sel(layer=1, position=3).values, score.numpy())


def test_a_window_of_every_layer(tiny):
    found = patching(tiny("gpt2"), small_pairs(), "head", window=3, positions="all")
    assert found.head_out.dims == found.head_out_summed.dims == ("prompt", "layer", "head")
    assert found.sizes["layer"] == 1


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_key_value_head_is_its_group_of_query_heads(tiny, direction):
    """E9: in a copy with one key/value head per query head, patching the copies together is patching the original."""
    model, pairs = tiny("llama3", torch.float64), small_pairs()
    cfg = dataclasses.replace(model.cfg, n_kv_heads=model.cfg.n_heads)
    weights = {
        name: w.data.repeat_interleave(model.cfg.group_size, 0) if name[-3:] in ("W_K", "W_V", "b_K", "b_V") else w.data
        for name, w in model.named_parameters()
    }
    apart = Transformer(cfg, weights, model.tokenizer)
    base = "corrupt" if direction == "denoise" else "clean"
    runs = PatchedRuns(apart, pairs, base=base, sites=["k", "v"])
    logit_diff = METRICS["logit_diff"]
    for site in ("k", "v"):
        effects = patching(model, pairs, site, direction=direction)
        assert effects.dims == ("prompt", "layer", "kv_head", "position")
        for layer, group, position in ((0, 0, 3), (1, 1, 2), (2, 0, 5)):
            joint = tuple(Patch(site, layer, 2 * group + i, position) for i in range(2))
            score = logit_diff(runs.patched(joint), pairs) - logit_diff(runs.plain(base), pairs)
            mine = effects.sel(layer=layer, kv_head=group, position=position)
            np.testing.assert_allclose(mine.values, score.numpy(), rtol=1e-9, atol=1e-12)


# --------------------------------------------------------------------------------------------------------- metrics


def doubled(logits):
    """Twice the logit of token 9."""
    return 2 * logits[:, 9]


def test_several_metrics_in_one_call_are_each_alone(tiny):
    pairs, mine = small_pairs(), Metric("mine", "apples", lambda x, p, _: x[:, 7])
    metrics = [name for name in METRICS if name != "accuracy"] + [doubled, mine, lambda x, p: x[:, 0] * len(p)]
    together = patching(tiny("gpt2"), pairs, "attn_out", metric=metrics)
    assert together.dims == ("metric", "prompt", "layer", "position")
    assert together.metric.values.tolist()[-3:] == ["doubled", "mine", "<lambda>"]
    assert together.metric_clean.dims == ("metric", "prompt")
    for i, metric in enumerate(metrics):
        alone = patching(tiny("gpt2"), pairs, "attn_out", metric=metric)
        np.testing.assert_array_equal(together[i].values, alone.values)
        np.testing.assert_array_equal(together.metric_clean[i].values, alone.metric_clean.values)


def test_a_callable_is_a_metric_and_units_are_said(tiny):
    pairs = small_pairs(seed=1)
    by_callable = patching(tiny("gpt2"), pairs, "attn_out", metric=doubled)
    assert by_callable.attrs["metric"] == "doubled"
    assert by_callable.attrs["unit"] == ""
    other = dataclasses.replace(pairs, answers=torch.tensor([[9], [9]]))
    np.testing.assert_allclose(
        by_callable.values, 2 * patching(tiny("gpt2"), other, "attn_out", metric="answer_logit").values, rtol=1e-6
    )
    assert patching(tiny("gpt2"), pairs, "attn_out", metric="probability").attrs["unit"] == "probability"


def test_normalising_divides_by_each_prompts_own_gap(tiny):
    plain, shares = (patching(tiny("gpt2"), small_pairs(n=3), "mlp_out", normalize=n) for n in (False, True))
    xr.testing.assert_allclose(shares, plain / gap(plain), rtol=1e-6)
    assert shares.attrs["unit"] == "share of clean - corrupt"
    assert shares.attrs["normalized"] == 1


def test_kl_to_the_clean_run_is_zero_there(tiny):
    effects = patching(tiny("gpt2"), small_pairs(), "resid_pre", metric="kl_divergence", direction="noise")
    assert (effects.metric_clean == 0).all()
    assert (effects >= 0).all()


def test_one_answer_per_prompt_needs_no_second_axis(tiny):
    pairs = small_pairs()
    flat = dataclasses.replace(pairs, answers=pairs.answers[:, 0], wrong_answers=pairs.wrong_answers[:, 0])
    assert patching(tiny("gpt2"), flat, "attn_out").equals(patching(tiny("gpt2"), pairs, "attn_out"))


# --------------------------------------------------------------------------------------------- corrupted embeddings


@pytest.mark.parametrize("kind", ["gaussian", "zero", "mean", "resample"])
@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_corrupted_embeddings_are_a_corrupt_run(tiny, family, kind):
    model = tiny(family)
    pairs = corrupt(model, small_pairs(n=3, differ=(2, 4), seed=5), kind, seed=1)
    whole = patching(model, pairs, "resid_pre", positions="all")
    assert (whole == gap(whole)).all()
    each = patching(model, pairs, "resid_pre", direction="noise")
    assert (each.sel(position=[0, 1]) == 0).all()
    assert (each.sel(layer=0, position=[3, 5]) == 0).all()
    assert (each.sel(layer=0, position=2) != 0).all()
    assert each.attrs["corruption"].startswith(kind)
    assert each.attrs["seed"] == 1


# -------------------------------------------------------------------------------------------------------- labelling


def test_scores_say_how_they_were_made(tiny):
    pairs = dataclasses.replace(small_pairs(), seed=7)
    effects = everything(tiny("llama3"), pairs)
    a = effects.attrs
    assert a["sign"] == "metric(patched) - metric(corrupt): positive means the patch raises the metric"
    assert (a["metric"], a["unit"], a["direction"], a["engine"]) == ("logit_diff", "logits", "denoise", "hooks")
    assert (a["model"], a["task"], a["corruption"], a["n_prompts"]) == ("llama3", "random", "given", 2)
    assert (a["seed"], a["dtype"], a["device"], a["window"]) == (7, "float32", "cpu", 1)
    assert "torch" in a["versions"]
    assert "transformer_lens 4" in a["versions"]
    noise = patching(tiny("llama3"), pairs, "q", direction="noise")
    assert "metric(patched) - metric(clean)" in noise.attrs["sign"]
    assert noise.attrs["site"] == "q"
    dims = {name: array.dims[1:] for name, array in effects.data_vars.items()}
    stream = ("layer", "position")
    assert dims == {
        **dict.fromkeys(("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"), stream),
        "head_out": ("layer", "head", "position"), "q": ("layer", "head", "position"),
        "k": ("layer", "kv_head", "position"), "v": ("layer", "kv_head", "position"),
        "pattern": ("layer", "head", "position"), "neuron_out": ("neuron", "position"),
    }  # fmt: skip
    assert effects.neuron.values.tolist() == NEURONS
    assert effects.head_out.node.sel(layer=1, head=2).item() == "a1.h2"
    assert effects.sizes["kv_head"] == 2


def test_attributes_and_coordinates_survive_a_file(tiny, tmp_path):
    """Plain values only, so that NetCDF, Zarr and JSON can all hold them."""
    effects = everything(tiny("gpt2"), small_pairs())
    assert all(isinstance(v, str | int | float) for v in effects.attrs.values())
    for array in effects.data_vars.values():
        assert all(c.dtype != object for c in array.coords.values())


def test_labels_show_spaces_and_mark_where_prompts_differ(tiny):
    pairs = dataclasses.replace(
        small_pairs(length=3, lengths=[3, 2], differ=(1,)), token_strings=((" a", "\n", " b c"), (" a", "\t"))
    )
    effects = patching(tiny("gpt2"), pairs, "resid_pre")
    assert effects.token.values.tolist() == ["0:␣a", "1:⏎*", "2:␣b␣c"]
    assert position_labels(pairs, [-1]) == ["-1:␣b␣c*"]
    assert position_labels(dataclasses.replace(pairs, token_strings=None), [0, 2]) == ["0", "2"]
    assert visible("\t x\n") == "⇥␣x⏎"


def test_pattern_cells_are_causal_and_labelled(tiny):
    effects = patching(tiny("gpt2"), small_pairs(differ=(2,)), "pattern", positions="cells")
    assert effects.dims == ("prompt", "layer", "head", "position", "source")
    future = xr.where(effects.source > effects.position, True, False)
    assert effects.where(future, 0).isnull().sum() == 0 or effects.where(future, drop=True).isnull().all()
    assert effects.where(~future, drop=True).notnull().sum() == 2 * 3 * 4 * 21
    assert effects.source_token.values.tolist() == effects.token.values.tolist()
    assert zero_or_padding(effects.sel(position=slice(0, 1)))


def test_nodes_position_by_position_are_the_sites_own_scores(tiny):
    model, pairs = tiny("gpt2", torch.float64), small_pairs(lengths=[4, 6])
    nodes = patch_nodes(model, pairs, ["a1.h2", "m0", "m2.n5"], direction="noise", batch_size=1)
    assert nodes.dims == ("prompt", "node", "position")
    head = patching(model, pairs, "head", direction="noise").sel(layer=1, head=2)
    mlp = patching(model, pairs, "mlp_out", direction="noise").sel(layer=0)
    neuron = patching(model, pairs, "neuron", direction="noise", neurons=["m2.n5"]).isel(neuron=0)
    for i, expected in enumerate((head, mlp, neuron)):
        np.testing.assert_allclose(nodes[:, i].values, expected.values, rtol=1e-10, atol=1e-10)


# ----------------------------------------------------------------------------------------------------------- errors


def test_a_small_gap_is_warned_of(tiny):
    pairs = small_pairs(n=3, lengths=[6, 4, 6])
    same = pairs.clean.clone()
    same[[0, 2]] = pairs.corrupt[[0, 2]]
    with pytest.warns(UserWarning, match=r"logit_diff.*near zero on prompts 1: normalised scores are unreliable"):
        shares = patching(tiny("gpt2"), dataclasses.replace(pairs, corrupt=same), "resid_pre", normalize=True)
    assert shares[1].isnull().all()
    assert shares[0].notnull().all()


@pytest.mark.parametrize(
    ("sites", "options", "error", "says"),
    [
        ("resid", {}, SiteError, r"'resid' is not a site .*did you mean 'resid_"),
        ([], {}, SiteError, "no sites"),
        ("neuron", {"neurons": None}, SiteError, r'needs neurons=\["m3.n17"'),
        ("neuron", {"neurons": ["m0"]}, SiteError, "m0 is not a neuron"),
        ("neuron", {"neurons": ["m9.n1"]}, SiteError, "has no node m9.n1"),
        ("neuron", {"neurons": ["n1"]}, SiteError, "'n1' is not a node"),
        ("neuron", {"window": 2}, OptionError, "windows .* single neurons"),
        ("resid_pre", {"window": 0}, OptionError, "window 0 is not between 1 and the model's 3 layers"),
        ("resid_pre", {"window": 4}, OptionError, "window 4"),
        ("resid_pre", {"positions": "cells"}, OptionError, "is for site \"pattern\", not for 'resid_pre'"),
        ("resid_pre", {"positions": [6]}, OptionError, "position 6 is outside the prompts"),
        ("resid_pre", {"positions": [0, -5]}, OptionError, "position -5 is outside the prompts"),
        ("resid_pre", {"positions": []}, OptionError, "position"),
        ("resid_pre", {"batch_size": 0}, OptionError, "at least 1"),
        ("resid_pre", {"metric": "logitdiff"}, MetricError, "did you mean 'logit_diff'"),
        ("resid_pre", {"metric": []}, MetricError, "metric"),
        ("resid_pre", {"metric": lambda x: x}, MetricError, "returned shape"),
        ("resid_pre", {"metric": lambda x: x[:, 0] * float("nan")}, MetricError, "not finite on prompts 0, 1"),
    ],
)
def test_what_cannot_be_patched_is_said(tiny, sites, options, error, says):
    with pytest.raises(error, match=says):
        patching(tiny("gpt2"), small_pairs(lengths=[6, 4]), sites, **options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"direction": "denoising"}, "'denoising' is not a direction .*did you mean 'denoise'"),
        ({"engine": "sweeps"}, "'sweeps' is not a engine|'sweeps' is not an engine"),
        ({"positions": "every"}, "'every' is not a choice of positions"),
    ],
)
def test_unknown_choices_are_said(tiny, options, says):
    with refused(OptionError, says):
        patching(tiny("gpt2"), small_pairs(), "resid_pre", **options)


def test_a_metric_that_breaks_during_a_patch_names_the_prompt(tiny):
    calls = []

    def fragile(logits):
        """Finite on the clean and the corrupt run, not on the third call's second prompt."""
        calls.append(1)
        return logits[:, 3] + torch.tensor([0.0, torch.nan if len(calls) > 2 else 0.0])

    with pytest.raises(MetricError, match="fragile is not finite on prompts 1"):
        patching(tiny("gpt2"), small_pairs(), "resid_pre", metric=fragile)


def test_a_metric_without_its_wrong_answers_says_so(tiny):
    with pytest.raises(MetricError, match="needs wrong answers"):
        patching(tiny("gpt2"), small_pairs(wrong_answers=None), "resid_pre")


def test_parallel_models_have_no_resid_mid(tiny):
    with pytest.raises(SiteError, match="pythia has no resid_mid: its attention and MLP run in parallel"):
        patching(tiny("pythia"), small_pairs(), "resid_mid")


def test_a_prompt_beyond_the_context_is_an_error_a_user_can_mend(tiny):
    with pytest.raises(TaskError, match=r"65 tokens is longer than gpt2's 64"):
        patching(tiny("gpt2"), small_pairs(length=65), "resid_pre", positions="all")


# --------------------------------------------------------------------------------------- a patch that is not a patch


def test_a_hook_that_does_not_fire_is_an_error(tiny, monkeypatch):
    from interp.model.run import logits_at

    monkeypatch.setattr("interp.interventions.logits_at", lambda m, t, r, hooks=(): logits_at(m, t, r))
    with pytest.raises(PatchError, match=r"blocks.0.hook_resid_pre fired 0 times"):
        patching(tiny("gpt2"), small_pairs(), "resid_pre")


def test_a_hook_that_fires_twice_is_an_error(tiny, monkeypatch):
    from interp.model.run import logits_at

    monkeypatch.setattr(
        "interp.interventions.logits_at", lambda m, t, r, hooks=(): logits_at(m, t, r, [*hooks, *hooks])
    )
    with pytest.raises(PatchError, match=r"fired 2 times in a patched run, not once"):
        patching(tiny("gpt2"), small_pairs(), "head")


def test_a_self_patch_that_changes_something_is_an_error(tiny, monkeypatch):
    from interp.model.run import record

    def off(*args):
        return {name: value + 1e-3 for name, value in record(*args).items()}

    monkeypatch.setattr("interp.interventions.record", off)
    with pytest.raises(PatchError, match=r"patching attn_out with its own values moves the logits by"):
        patching(tiny("gpt2"), small_pairs(), "attn_out")
