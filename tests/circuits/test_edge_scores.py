"""Scores of edges from a few passes (`edge_scores`), one edge at a time: EAP with any rules, and its integrated variants.

Held against gradients at every reader's own input, from a forward pass that keeps readers apart one by one
(tests/circuits/masked_oracle.py). What scores add up to: tests/circuits/test_edge_scores_sums.py.
"""

import copy
import dataclasses
import random

import numpy as np
import pytest
import torch
import xarray as xr

from interp import PromptPairs, attribution, corrupt, edge_patching
from interp.circuits.edges import LEVELS, METHODS, edge_scores
from interp.circuits.graph import Graph, edge_mask, readers, writers
from interp.errors import MetricError, OptionError, PatchError, RulesError, UnsupportedModel
from interp.rules import GRADIENT, RULES, get_rules
from tests.circuits.masked_oracle import cut, eap_by_hand, embeddings, gradients
from tests.circuits.test_exact import DIFFERENT, OTHERS, logit_diff, prompts
from tests.families import quiet
from tests.small_pairs import refused

DIRECTIONS = pytest.mark.parametrize("direction", ["denoise", "noise"])
DOUBLE = torch.float64
PATHS = ("eap-ig", "eap-ig-activations")


def sides(direction: str) -> tuple[str, str]:
    """(base, source)."""
    return ("corrupt", "clean") if direction == "denoise" else ("clean", "corrupt")


def gap(scores: xr.DataArray) -> np.ndarray:
    """[prompt]: metric(source) - metric(base)."""
    return (scores.metric_clean - scores.metric_corrupt).values * (1 if scores.direction == "denoise" else -1)


def nodes_of(model, pairs: PromptPairs, **options) -> np.ndarray:
    """[prompt, source]: node attribution of the input and of every component, over all positions."""
    found = attribution(model, pairs, ["resid_pre", "head", "mlp_out"], positions="all", **options)
    columns = [found.resid_pre.sel(layer=0)]
    for layer in range(model.cfg.n_layers):
        columns += [found.head_out.sel(layer=layer, head=head) for head in range(model.cfg.n_heads)]
        columns.append(found.mlp_out.sel(layer=layer))
    return np.stack([column.values for column in columns], 1)


def added_as_they_are(cfg) -> list[int]:
    """Places of the writers whose output enters the stream as it is: not those of heads whose sum is normed first."""
    return [i for i, name in enumerate(writers(cfg)) if name[0] != "a" or not cfg.post_norm]


def from_input(scores: xr.DataArray) -> np.ndarray:
    """[prompt]: sum over the edges out of the input."""
    return scores.sel(source="input").sum("target").values


def assert_edges(scores: xr.DataArray, by_hand: np.ndarray, cfg, tolerance: float = 1e-10):
    there = edge_mask(cfg)
    assert np.array_equal(scores.notnull(), np.broadcast_to(there, scores.shape))
    np.testing.assert_allclose(scores.values[:, there], by_hand[:, there], rtol=tolerance, atol=tolerance)
    assert abs(by_hand[:, there]).max() > 0.01


def assert_close(found, expected, tolerance: float = 1e-9):
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------- edge by edge, from the definition


@pytest.mark.parametrize(
    ("rules", "direction"),
    [("gradient", "denoise"), ("gradient", "noise"), ("relp", "noise"), ("attnlrp", "denoise"), ("secant", "noise")],
)
@pytest.mark.parametrize("family", DIFFERENT)
def test_every_edge_is_what_its_source_writes_times_what_arrives_at_its_target(tiny, family, rules, direction):
    """Under a post-norm (gemma2, olmo2), what a head writes is what it alone changes of the normed sum."""
    model, pairs = tiny(family, DOUBLE), prompts()
    base, source = (embeddings(model, pairs, side) for side in sides(direction))
    found = gradients(model, pairs, base, other=source, rules=get_rules(rules))
    scores = edge_scores(model, pairs, rules=rules, direction=direction)
    assert_edges(scores, eap_by_hand(model, pairs, direction, found), model.cfg)


@pytest.mark.parametrize("family", OTHERS)
def test_edges_of_every_other_family_are_too(tiny, family):
    model, pairs, rng = tiny(family, DOUBLE), prompts(), random.Random(family)
    direction, rules = rng.choice(["denoise", "noise"]), rng.choice(sorted(RULES))
    base, source = (embeddings(model, pairs, side) for side in sides(direction))
    found = gradients(model, pairs, base, other=source, rules=get_rules(rules))
    scores = edge_scores(model, pairs, rules=rules, direction=direction)
    assert_edges(scores, eap_by_hand(model, pairs, direction, found), model.cfg)


@pytest.mark.parametrize(("steps", "rules"), [(1, "gradient"), (3, "ln-only")])
@pytest.mark.parametrize("family", DIFFERENT)
def test_eap_ig_is_the_mean_gradient_on_the_way(tiny, family, rules, steps):
    """With one step, the gradient halfway."""
    model, pairs = tiny(family, DOUBLE), prompts()
    base, source = (embeddings(model, pairs, side) for side in ("corrupt", "clean"))
    points, weights = np.polynomial.legendre.leggauss(steps)
    assert steps > 1 or points[0] == 0
    passes = [gradients(model, pairs, base + (p + 1) / 2 * (source - base), rules=get_rules(rules)) for p in points]
    mean = {v: sum(w / 2 * found[v] for w, found in zip(weights, passes, strict=True)) for v in readers(model.cfg)}
    scores = edge_scores(model, pairs, method="eap-ig", rules=rules, steps=steps)
    assert_edges(scores, eap_by_hand(model, pairs, "denoise", mean), model.cfg)


@pytest.mark.parametrize("family", ["gpt2", "llama3", "gemma2", "pythia"])
def test_eap_ig_activations_moves_one_sublayer_at_a_time(tiny, family):
    model, pairs, names = tiny(family, DOUBLE), prompts(), writers(tiny(family, DOUBLE).cfg)
    direction = random.Random(family).choice(["denoise", "noise"])
    (base, source), there = sides(direction), edge_mask(model.cfg)
    runs = {}
    for side in (base, source):
        _, cache = model.run_with_cache(pairs.tokens(side), return_type=None)
        runs[side] = dict(cache.items())
    hooks = {"input": "hook_embed"}
    for layer in range(model.cfg.n_layers):
        hooks |= {f"a{layer}": f"blocks.{layer}.hook_attn_out", f"m{layer}": f"blocks.{layer}.hook_mlp_out"}
    expected = np.zeros((len(pairs), *there.shape))
    points, weights = np.polynomial.legendre.leggauss(2)
    for sublayer, hook in hooks.items():
        rows = [i for i, name in enumerate(names) if name.partition(".")[0] == sublayer]
        behind = [v for j, v in enumerate(readers(model.cfg)) if there[rows[0], j]]
        change = runs[source][hook] - runs[base][hook]
        for p, w in zip(points, weights, strict=True):
            moved = dict.fromkeys(behind, (p + 1) / 2 * change)
            found = gradients(model, pairs, embeddings(model, pairs, base), moved=moved)
            expected[:, rows] += w / 2 * eap_by_hand(model, pairs, direction, found)[:, rows]
    scores = edge_scores(model, pairs, method="eap-ig-activations", steps=2, direction=direction)
    assert_edges(scores, expected, model.cfg)


# --------------------------------------------------------------------------------------------------- directions, options


@pytest.mark.parametrize(("family", "level"), [("gpt2", "edge"), ("gemma2", "edge"), ("llama3", "node")])
def test_both_runs_and_both_directions_are_means(tiny, family, level):
    model, pairs, some = tiny(family, DOUBLE), prompts(), added_as_they_are(tiny(family, DOUBLE).cfg)
    score = lambda **options: edge_scores(model, pairs, level=level, **options)  # noqa: E731
    for method in ("eap", *PATHS, "clean-corrupted"):
        there, back, both = (score(method=method, direction=x) for x in ("denoise", "noise", "both"))
        assert_close(both, (there - back) / 2, 1e-12)
        assert [x.attrs["direction"] for x in (there, back, both)] == ["denoise", "noise", "both"]
        assert both.attrs["sign"] not in (there.attrs["sign"], back.attrs["sign"])
        if method == "eap":
            mean = both
            assert not np.allclose(there, -back, rtol=0.01, equal_nan=True)
        elif method != "eap-ig-activations":  # these look at the same points from either side
            assert_close(back[:, some], -there[:, some], 1e-11)
    assert_close(score(method="clean-corrupted")[:, some], mean[:, some], 1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_normalised_scores_are_shares_of_the_gap(tiny, method):
    model, pairs = tiny("llama3", DOUBLE), prompts()
    scores, shares = (edge_scores(model, pairs, method=method, normalize=x, direction="noise") for x in (False, True))
    assert_close(shares, scores / (scores.metric_clean - scores.metric_corrupt), 1e-12)
    assert (scores.attrs["normalized"], shares.attrs["normalized"]) == (0, 1)
    assert (scores.attrs["unit"], shares.attrs["unit"]) == ("logits", "share of clean - corrupt")


@pytest.mark.parametrize(
    ("family", "options"),
    [("pythia", {}), ("pythia", {"method": "eap-ig-activations", "steps": 2}), ("gemma2", {"rules": "secant"}),
     ("gemma2", {"method": "eap-ig", "steps": 2}), ("gpt2", {"level": "channel"})],
    ids=str,
)  # fmt: skip
def test_chunks_batches_and_padding_change_nothing(tiny, family, options):
    model, pairs = tiny(family, DOUBLE), prompts()
    scores = edge_scores(model, pairs, **options)
    for parts in ({"max_memory": 1}, {"max_memory": 600_000, "batch_size": 3}):
        xr.testing.assert_allclose(edge_scores(model, pairs, **parts, **options), scores, rtol=1e-11, atol=1e-11)
    for i in range(len(pairs)):
        assert_close(edge_scores(model, cut(pairs, i), **options)[0], scores[i], 1e-11)


@pytest.mark.parametrize("options", [{}, {"rules": "secant"}, {"method": "eap-ig-activations", "steps": 2}], ids=str)
@pytest.mark.parametrize("family", DIFFERENT)
def test_float32_agrees_to_four_digits(tiny, family, options):
    """The same weights, to the last bit, in both precisions."""
    narrow, pairs = tiny(family, torch.float32), prompts()
    found, expected = (edge_scores(m, pairs, **options).fillna(0) for m in (narrow, copy.deepcopy(narrow).double()))
    assert (found.dtype, expected.dtype) == (np.float32, np.float64)
    assert np.linalg.norm(found - expected) <= 1e-4 * np.linalg.norm(expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["gemma2", "pythia"])
def test_bfloat16_runs_and_is_about_the_same(tiny, family, method):
    narrow, pairs = tiny(family, torch.bfloat16), prompts()
    found, expected = (edge_scores(m, pairs, method=method).fillna(0) for m in (narrow, copy.deepcopy(narrow).double()))
    assert found.dtype == np.float32
    # exact patching subtracts two rounded runs; slopes are rounded relative to themselves
    assert np.linalg.norm(found - expected) <= (0.3 if method == "exact" else 0.05) * np.linalg.norm(expected)


def test_metrics_that_are_not_linear_have_their_gradient_in_each_run(tiny):
    model, pairs = tiny("gpt2", DOUBLE), prompts()
    clean = model(pairs.clean, read_at=pairs.read_at).log_softmax(-1)

    def mass(logits, pairs):
        return torch.stack([x[t[t >= 0]].sum() for x, t in zip(logits.softmax(-1), pairs.answers, strict=True)])

    by_hand = {
        "probability": mass,
        "kl_divergence": lambda x, _: (clean.exp() * (clean - x.log_softmax(-1))).sum(-1),
        lambda logits: logits[:, 7].square(): lambda x, _: x[:, 7].square(),
        mass: mass,
    }
    for metric, function in by_hand.items():
        found = gradients(model, pairs, embeddings(model, pairs, "corrupt"), metric=function)
        scores = edge_scores(model, pairs, metric=metric)
        np.testing.assert_allclose(
            scores.fillna(0), eap_by_hand(model, pairs, "denoise", found) * edge_mask(model.cfg), rtol=1e-9, atol=1e-12
        )
        for method in PATHS:  # the metric's gradient is another one at each point
            scores = edge_scores(model, pairs, metric=metric, method=method, steps=48)
            np.testing.assert_allclose(from_input(scores), gap(scores), rtol=1e-6, atol=1e-9)


def test_kl_has_no_gradient_in_the_clean_run_but_on_a_path_from_it(tiny):
    model, pairs = tiny("gpt2", DOUBLE), prompts()
    for options in ({"direction": "noise"}, {"direction": "both"}, {"method": "clean-corrupted"}):
        with pytest.raises(MetricError, match="gradient of kl_divergence is zero in the clean run"):
            edge_scores(model, pairs, metric="kl_divergence", **options)
    for options in ({"rules": "secant"}, {"method": "eap-ig", "steps": 48}):
        scores = edge_scores(model, pairs, metric="kl_divergence", direction="noise", **options)
        assert_close(from_input(scores), gap(scores), 1e-6)


@DIRECTIONS
def test_noise_on_embeddings_travels_along_edges_too(tiny, direction):
    model = tiny("llama3", DOUBLE)
    pairs = corrupt(model, prompts(), "gaussian", seed=1)
    scores = edge_scores(model, pairs, direction=direction)
    expected = nodes_of(model, pairs, direction=direction)
    assert_close(scores.sum("target"), expected)
    assert abs(expected[:, 0]).max() > 0.01
    found = gradients(model, pairs, embeddings(model, pairs, sides(direction)[0]))
    assert_edges(scores, eap_by_hand(model, pairs, direction, found), model.cfg)
    secants = edge_scores(model, pairs, direction=direction, rules="secant")
    assert_close(from_input(secants), gap(secants))


# -------------------------------------------------------------------------------------------------------------- positions


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "pythia"])
def test_each_position_is_what_is_written_there_times_what_arrives_there(tiny, family):
    model, pairs = tiny(family, DOUBLE), prompts()
    found = gradients(model, pairs, embeddings(model, pairs, "clean"))
    by_hand = eap_by_hand(model, pairs, "noise", found, positions="each")
    scores = edge_scores(model, pairs, positions="each", direction="noise")
    assert scores.dims == ("prompt", "source", "target", "position")
    assert scores.position.values.tolist() == list(range(8))
    assert "position" in scores.token.dims
    there = edge_mask(model.cfg)[None, :, :, None] & pairs.is_token.numpy()[:, None, None]
    np.testing.assert_array_equal(scores.notnull(), there)
    np.testing.assert_allclose(scores.values[there], by_hand[there], rtol=1e-10, atol=1e-10)
    assert not by_hand[np.broadcast_to(~pairs.is_token.numpy()[:, None, None], by_hand.shape)].any()


@pytest.mark.parametrize("family", ["llama3", "pythia"])
def test_each_position_of_a_node_is_its_attribution_there(tiny, family):
    model, pairs = tiny(family, DOUBLE), prompts()
    nodes = edge_scores(model, pairs, positions="each", level="node", rules="relp", normalize=True)
    found = attribution(model, pairs, ["head", "mlp_out"], rules="relp", normalize=True)
    for layer in range(model.cfg.n_layers):
        expected = found.mlp_out.sel(layer=layer).transpose("prompt", "position")
        assert_close(nodes.sel(source=f"m{layer}"), expected)  # NaN at the same places
        for head in range(model.cfg.n_heads):
            expected = found.head_out.sel(layer=layer, head=head).transpose("prompt", "position")
            assert_close(nodes.sel(source=f"a{layer}.h{head}"), expected)
    np.testing.assert_array_equal(nodes.token, found.token)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("method", ["eap", *PATHS, "clean-corrupted"])
def test_positions_add_up(tiny, method, level):
    model, pairs = tiny("gpt2", DOUBLE), prompts()
    options = {"method": method, "level": level, "direction": "both" if method == "eap" else "noise"}
    each, whole = (edge_scores(model, pairs, positions=x, **options) for x in ("each", "all"))
    assert each.dims == (*whole.dims, "position")
    xr.testing.assert_allclose(each.sum("position", min_count=1).drop_vars("token", errors="ignore"), whole, atol=1e-10)
    parts = edge_scores(model, pairs, positions="each", max_memory=1, **options)
    xr.testing.assert_allclose(parts, each, rtol=1e-11, atol=1e-11)


# --------------------------------------------------------------------------------------------------------- how it is told


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["gpt2", "pythia", "gemma2"])
def test_there_is_a_number_for_every_edge_and_nan_for_everything_else(tiny, family, method):
    model, pairs = tiny(family, torch.float32), prompts()
    scores = edge_scores(model, pairs, method=method, direction="noise")
    assert scores.dims == ("prompt", "source", "target")
    assert scores.source.values.tolist() == writers(model.cfg)
    assert scores.target.values.tolist() == readers(model.cfg)
    assert scores.prompt.values.tolist() == [0, 1, 2, 3]
    np.testing.assert_array_equal(scores.notnull(), np.broadcast_to(edge_mask(model.cfg), scores.shape))
    for side in ("clean", "corrupt"):
        expected = logit_diff(model(pairs.tokens(side), read_at=pairs.read_at), pairs)
        np.testing.assert_allclose(scores[f"metric_{side}"], expected, rtol=1e-4, atol=1e-4)
    assert scores.attrs["direction"] == "noise"
    assert scores.attrs["metric"] == "logit_diff"


@pytest.mark.parametrize("family", ["gpt2", "pythia"])
def test_scores_say_how_they_were_made(tiny, family):
    model, pairs = tiny(family, torch.float32), prompts()
    for options, expected in (
        ({}, {"method": "eap", "rules": "gradient", "switches": "{}", "steps": 0, "site": "edges"}),
        (
            {"rules": "ln-only"},
            {"method": "eap", "rules": "ln-only", "switches": "{'norm_scale': 'frozen'}", "steps": 0},
        ),
        ({"method": "eap-ig"}, {"method": "eap-ig", "steps": 5}),
        ({"method": "eap-ig-activations", "steps": 2}, {"method": "eap-ig-activations", "steps": 2}),
        ({"method": "clean-corrupted", "level": "node"}, {"method": "clean-corrupted", "steps": 0, "site": "nodes"}),
    ):
        attrs = edge_scores(model, pairs, **options).attrs
        assert {name: attrs[name] for name in expected} == expected
        assert Graph.from_attrs(attrs) == dataclasses.replace(Graph.of(model.cfg), name=attrs["model"])
        assert (attrs["n_layers"], attrs["parallel"]) == (3, int(family == "pythia"))


def test_exact_scores_are_edge_patchings(tiny):
    model, pairs, options = tiny("llama3", DOUBLE), prompts(), {"direction": "both", "metric": "probability"}
    found, exact = edge_scores(model, pairs, method="exact", **options), edge_patching(model, pairs, **options)
    xr.testing.assert_equal(found, exact)
    plans = []
    edge_scores(model, pairs, method="exact", announce=plans.append)
    assert [plan.cells for plan in plans] == [edge_mask(model.cfg).sum()]
    assert Graph.from_attrs(found.attrs) == dataclasses.replace(Graph.of(model.cfg), name=found.attrs["model"])


def test_pairs_that_do_not_differ_score_nothing(tiny):
    pairs = prompts()
    pairs = dataclasses.replace(pairs, corrupt=pairs.clean)
    for options in ({}, {"rules": "secant"}, *({"method": method} for method in PATHS)):
        with pytest.warns(UserWarning, match="near zero on prompts 0, 1, 2, 3"):
            assert (edge_scores(tiny("llama3"), pairs, **options).fillna(0) == 0).all()


# -------------------------------------------------------------------------------------------------------------- refusals


def square_of_the_first(logits: torch.Tensor) -> torch.Tensor:
    """A metric that is no sum of logits and has no slope between two runs."""
    return logits[:, 0] ** 2


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"method": "eap-gi"}, OptionError, "'eap-gi' is not a method .*did you mean 'eap-ig'"),
        ({"level": "edges"}, OptionError, "'edges' is not a level .*did you mean 'edge'"),
        ({"direction": "noising"}, OptionError, "'noising' is not a direction .*did you mean 'noise'"),
        ({"rules": "replp"}, RulesError, "'replp' is not a rule set .*did you mean 'relp'"),
        ({"metric": "logit_dif"}, MetricError, "did you mean 'logit_diff'"),
        ({"metric": "accuracy"}, MetricError, "accuracy has no gradient"),
        ({"metric": square_of_the_first, "rules": "secant"}, MetricError, "square_of_the_first has no secant"),
        ({"steps": 5}, OptionError, "method 'eap' takes no steps"),
        ({"method": "clean-corrupted", "steps": 5}, OptionError, "method 'clean-corrupted' takes no steps"),
        ({"method": "exact", "steps": 5}, OptionError, "method 'exact' takes no steps"),
        ({"method": "eap-ig", "steps": 0}, OptionError, "a path needs at least 1 step, not 0"),
        ({"method": "eap-ig", "rules": "secant"}, RulesError, "'secant' lie between the two runs.*: use eap"),
        ({"method": "eap-ig-activations", "rules": "secant"}, RulesError, "a path between them adds nothing"),
        ({"method": "clean-corrupted", "rules": "relp,activation_slope=secant"}, RulesError, "lie between the two runs"),
        ({"method": "exact", "rules": "relp"}, OptionError, "follow no rules; for nodes see .*activation_patching"),
        ({"method": "exact", "rules": "secant"}, OptionError, "follow no rules"),
        ({"method": "exact", "level": "node"}, OptionError, "exact scores are of edges"),
        ({"method": "exact", "level": "channel"}, OptionError, "exact scores are of edges"),
        ({"method": "exact", "positions": "each"}, OptionError, "exact scores are of edges, of all positions at once"),
        ({"positions": "some"}, OptionError, "'some' is not a choice of positions .choose from all, each"),
        ({"max_memory": 0}, OptionError, "max_memory is a number of bytes, at least 1, not 0"),
        ({"batch_size": 0}, OptionError, "a batch needs at least 1 prompt, not 0"),
    ],
    ids=lambda value: getattr(value, "__name__", None) or ("" if "function" in str(value) else str(value)),
)  # fmt: skip
def test_what_cannot_be_scored_is_said(tiny, options, error, says):
    with refused(error, says):
        edge_scores(tiny("gpt2"), prompts(), **options)


def test_a_metric_that_lacks_what_it_needs_is_refused(tiny):
    with pytest.raises(MetricError, match="needs wrong answers, and these pairs have none"):
        edge_scores(tiny("gpt2"), dataclasses.replace(prompts(), wrong_answers=None))


@pytest.mark.parametrize("method", METHODS)
def test_a_model_with_hooks_of_its_own_is_refused(tiny, method):
    model = tiny("gpt2")
    with (
        model.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", lambda value, hook: value * 0)]),
        refused(PatchError, r"hook of its own at blocks\.1\.hook_resid_pre"),
    ):
        edge_scores(model, prompts(), method=method)


def test_a_bridge_is_refused(tiny_folder):
    from transformer_lens.model_bridge import TransformerBridge

    with quiet():
        bridge = TransformerBridge.boot_transformers(str(tiny_folder("gpt2")), device="cpu", dtype=torch.float32)
    with refused(UnsupportedModel, "scoring edges needs a model's own layers, and a TransformerBridge has others"):
        edge_scores(bridge, prompts())


def test_the_plain_gradient_written_out_is_the_plain_gradient(tiny):
    """Every switch at "exact", but not the same object: another way through the layers."""
    model, pairs = tiny("gpt2", DOUBLE), prompts()
    other = dataclasses.replace(GRADIENT, name="mine")
    xr.testing.assert_allclose(
        edge_scores(model, pairs, rules=other), edge_scores(model, pairs), rtol=1e-11, atol=1e-12
    )
