"""The edge level of the main job: what `discover(level="edge")` returns, says and shows, and what it refuses.

Its parts are tested where they live; here they must have been put together rightly: the circuit is the smallest of its
ranking, the tests on the page are those of that circuit, and a known circuit comes out whole.
"""

import numpy as np
import pytest

from interp import PromptPairs, check_edges, compare, discover, edge_patching, edge_scores, faithfulness
from interp.circuits.circuit import Circuit
from interp.circuits.discovery import CircuitDiscovery, discover_circuit
from interp.circuits.report import curve_figure, render
from interp.errors import OptionError
from tests.known_circuits.circuits import CIRCUITS
from tests.small_pairs import refused, small_pairs
from tests.test_report import EVIL, Page


@pytest.fixture(scope="module")
def found() -> CircuitDiscovery:
    known = CIRCUITS["induction"]()
    return discover(known.model, known.pairs, level="edge", target=0.999)


@pytest.fixture(scope="module")
def page(found) -> Page:
    return Page(render(found))


# ------------------------------------------------------------------------------------------------------------- what is found


@pytest.mark.parametrize("name", ["induction", "duplicate_mover", "mlp_gate", "reverse", "frac_prevs", "and_of_two"])
def test_a_known_circuit_comes_out_whole(name):
    known = CIRCUITS[name]()
    found = discover_circuit(known.model, known.pairs, method="exact", target=0.999)
    assert set(found.circuit.edges) <= known.edges
    assert float(found.faithfulness.faithfulness[0]) >= 0.999
    everything = discover_circuit(known.model, known.pairs, method="exact", n_edges=len(known.edges))
    assert set(everything.circuit.edges) == known.edges
    assert float(everything.completeness.complement) == pytest.approx(0, abs=1e-6)


def test_the_circuit_is_the_first_of_its_ranking_that_is_faithful_enough(found):
    size = int(found.circuit.attrs["n_edges"])
    known = CIRCUITS["induction"]()
    f = [
        float(faithfulness(known.model, known.pairs, Circuit.from_scores(found.scores, n_edges=n)).faithfulness[0])
        for n in range(size + 1)
    ]
    assert f[-1] >= 0.999 > max(f[:-1])
    assert float(found.faithfulness.faithfulness[0]) == pytest.approx(f[-1])


def test_scores_are_those_of_edge_scores_and_rules_alone_mean_one_pass(found):
    known = CIRCUITS["induction"]()
    assert (found.attrs["method"], found.attrs["direction"]) == ("eap-ig", "noise")
    expected = edge_scores(known.model, known.pairs, method="eap-ig", direction="noise")
    np.testing.assert_array_equal(found.scores.values, expected.values)
    by_rules = discover(known.model, known.pairs, level="edge", rules="secant", n_edges=5, direction="denoise")
    assert (by_rules.attrs["method"], by_rules.attrs["rules"], by_rules.attrs["direction"]) == (
        "eap",
        "secant",
        "denoise",
    )


def test_the_table_has_an_edge_a_row(found):
    table = found.table()
    assert sorted(table.edge) == sorted(found.circuit.edges)
    assert table.score.abs().is_monotonic_decreasing
    assert table.found_again.between(0, 1).all()
    assert "found_again" in found._repr_html_()
    assert repr(found) == f"CircuitDiscovery(induction on induction: {found.circuit.n_edges} edges, faithfulness 1.00)"


def test_positions_are_those_of_the_prompts_and_add_up(found):
    known = CIRCUITS["induction"]()
    assert found.by_position.sizes["position"] == known.pairs.clean.shape[1]
    total = edge_scores(known.model, known.pairs, method="eap-ig", direction="noise").mean("prompt")
    np.testing.assert_allclose(found.by_position.sum("position", skipna=False), total, atol=1e-9)


def test_text_says_how_good_it_is(found):
    says = found.text()
    for part in (*found.circuit.edges, "faithfulness 1.000", "CPR", "CMD", "Jaccard", "pearson", "eap-ig, noise"):
        assert part in says


# ------------------------------------------------------------------------------------------------------------------ checking


def test_a_check_of_all_edges_is_the_comparison_with_all_exact_edges(tiny):
    model, pairs = tiny("gpt2"), small_pairs(4)
    scores = edge_scores(model, pairs, direction="noise")
    check = check_edges(model, pairs, scores)
    assert check.n_checked == check.n_places
    exact = edge_patching(model, pairs, direction="noise")
    for statistic in ("pearson", "slope", "relative_error"):
        assert check.table[statistic].item() == pytest.approx(compare(scores, exact)[statistic].item(), abs=1e-6)


def test_a_check_of_some_edges_compares_those_alone(tiny):
    model, pairs = tiny("gpt2"), small_pairs(4)
    exact = edge_patching(model, pairs, direction="noise").assign_attrs(method="eap")
    check = check_edges(model, pairs, exact, n=7, seed=1)
    assert check.n_checked == 7
    assert check.table.pearson.item() == pytest.approx(1, abs=1e-5)
    with refused(OptionError, "cannot check 0 edges"):
        check_edges(model, pairs, exact, n=0)
    with refused(OptionError, "averaged"):
        check_edges(model, pairs, exact.mean("prompt", keep_attrs=True))


# ------------------------------------------------------------------------------------------------------------------- the page


def test_the_page_is_whole_and_shows_every_figure(page, found):
    assert page.open == []
    assert page.plots == 3  # circuit, curve, positions
    for part in (
        "The circuit",
        "Faithfulness by size",
        "How far to trust the scores",
        "same circuit?",
        *found.circuit.edges,
    ):
        assert part in page.text


def test_the_page_of_exact_edges_needs_no_agreement():
    known = CIRCUITS["reverse"]()
    page = Page(render(discover_circuit(known.model, known.pairs, method="exact")))
    assert "Every edge was patched exactly" in page.text


def test_prompts_cannot_break_the_page(tiny):
    pairs = small_pairs(2, token_strings=(EVIL, EVIL), name="<b>evil</b>", corruption="a&b")
    page = Page(render(discover_circuit(tiny("gpt2"), pairs, n_edges=10, n_resamples=3)))
    assert page.open == []
    assert page.count("b") == len([tag for tag, _ in page.tags if tag == "b"])
    assert "<b>evil</b>" in page.text


def test_an_empty_circuit_is_said_to_be_empty(tiny):
    found = discover_circuit(tiny("gpt2"), small_pairs(2), n_edges=0, n_resamples=3)
    assert any("No edge of this ranking" in note for note in found.notes)
    assert Page(render(found)).open == []
    assert float(found.faithfulness.faithfulness[0]) == pytest.approx(0, abs=1e-6)


def test_the_curve_is_drawn_as_it_is(found):
    figure = curve_figure(found.curve, 5)
    by_size = next(trace for trace in figure.data if trace.name == "ranked by |score|")
    drawn = found.curve.n_edges.values > 0
    np.testing.assert_allclose(by_size.y, found.curve.faithfulness.sel(by="size").values[drawn])
    assert figure.layout.xaxis.type == "log"


# -------------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"level": "edge", "engine": "hooks"}, 'engine "sweep" only'),
        ({"level": "edge", "method": "magic"}, "method"),
        ({"level": "edge", "target": 1.5}, "1.5"),
        ({"level": "edge", "n_resamples": 1}, "at least 2 resamples"),
        ({"level": "edge", "n_edges": 10**6}, "cannot keep 1000000"),
        ({"level": "edge", "method": "exact", "rules": "relp"}, "follow no rules"),
        ({"level": "node", "method": "eap"}, 'method: for level="edge" only'),
        ({"level": "neuron"}, "level"),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(tiny, options, says):
    with refused(OptionError, says):
        discover(tiny("gpt2"), small_pairs(2), **options)


def test_a_ranking_that_never_becomes_faithful_is_said_so(tiny):
    pairs: PromptPairs = small_pairs(2)
    with refused(OptionError, "no circuit of this ranking reaches"):
        # zero ablation of nothing but rounding: the whole model is 1, and more than that is asked of fewer edges
        scores = edge_scores(tiny("gpt2"), pairs).isel(target=slice(0, 3))
        from interp import smallest_circuit

        smallest_circuit(tiny("gpt2"), pairs, scores, target=0.9)
