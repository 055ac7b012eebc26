"""The page Patch: maps, agreement, and what is behind a cell."""

import numpy as np
import pytest

from app import jobs, looking
from app.behaviour import Behaviour
from app.locked import locked_model
from interp import activation_patching
from interp.errors import OptionError, SiteError
from interp.interventions import Patch
from interp.jobs.runner import run
from interp.metrics import METRICS
from tests.small_pairs import refused

IOI = Behaviour(n=3)


def test_the_page_opens_and_says_what_to_click(page):
    at = page("patch", n="3")
    assert at.title[0].value == "Patch"
    assert "Click a cell" in at.info[0].value
    assert len(at.get("echarts_chart")) == 1


@pytest.mark.parametrize("site", ["resid_pre", "head", "v"])
def test_an_approximation_stands_beside_with_its_agreement(page, site):
    at = page("patch", n="3", site=site, rules="relp")
    assert len(at.get("echarts_chart")) == 2
    found = {m.label: float(m.value) for m in at.metric}
    assert found["Pearson"] > 0.5
    assert set(found) == {"Pearson", "Spearman", "Slope", "Relative error", "Right sign", "Top 10"}


def test_a_shared_address_shows_the_cell_and_the_pin(page):
    at = page("patch", n="3", at="resid_pre@2@7", pin="resid_pre@1@3")
    assert "resid_pre, layer 2" in at.subheader[0].value
    tokens, effects = (d.value for d in at.dataframe)
    assert {"clean", "corrupt", "patched", "pinned"} <= set(tokens)
    np.testing.assert_allclose(effects["effect"] - effects["pinned"], effects["difference"])
    assert len(effects) == 3


def test_the_cell_is_pinned_by_the_button_and_let_go(page):
    at = page("patch", n="3", at="resid_pre@2@7")
    at.button(key="pin").click().run()
    assert at.session_state["selection"].pinned == "resid_pre@2@7"
    assert at.button(key="pin").disabled
    at.button(key="unpin").click().run()
    assert at.session_state["selection"].pinned is None


@pytest.mark.parametrize("place", ["resid_pre@99@0", "mlp_out@1@1", "head@1.2", "m5", "<b>"])
def test_a_place_of_another_map_is_not_looked_into(page, place):
    at = page("patch", n="3", at=place)
    assert "Click a cell" in at.info[0].value


def test_rules_that_cannot_be_followed_are_one_sentence_beside_the_exact_map(page):
    at = page("patch", n="3", metric="accuracy", rules="gradient", at="resid_pre@2@7")
    assert len(at.error) == 1
    assert at.subheader[0].value.startswith("resid_pre")  # the rest of the page is there


def test_every_switch_leaves_the_page_whole(page):
    at = page("patch", n="3", rules="gradient")
    at.segmented_control(key="direction").set_value("noise").run()
    at.selectbox(key="metric").set_value("probability").run()
    at.selectbox(key="site").set_value("attn_out").run()
    assert not at.exception
    assert "metric(patched) - metric(clean)" in at.caption[0].value


@pytest.fixture
def nothing_is_small(monkeypatch, tmp_path):
    """Every map is too much to wait for; runs are in a folder of this test's own."""
    monkeypatch.setattr(looking, "SMALL", 0)
    monkeypatch.setenv("INTERP_APP_RUNS", str(tmp_path / "runs"))


def test_what_takes_long_is_offered_as_a_job(page, nothing_is_small):
    at = page("patch", n="3")
    assert at.button(key="submit").label == "Run as a job"
    assert not at.get("echarts_chart")
    assert not jobs.runs().ids()  # nothing starts by itself


def test_a_finished_job_is_the_map(page, nothing_is_small):
    job = jobs.job_of(IOI, "patch", sites="head", metric="logit_diff", direction="noise", positions="all")
    run(job, jobs.runs())
    at = page("patch", n="3", site="head", direction="noise", at="head@1.2", rules="gradient")
    assert len(at.get("echarts_chart")) == 2
    np.testing.assert_array_equal(
        at.dataframe[1].value["effect"], looking.exact_map(IOI, "head", "logit_diff", "noise").isel(layer=1, head=2)
    )


@pytest.mark.parametrize("site", ["resid_pre", "head"])
def test_operations_grow_with_the_pairs(site):
    assert looking.flops(Behaviour(n=6), site) > 1.5 * looking.flops(IOI, site) > 0


# ------------------------------------------------------------------------------------------------- what it computes


@pytest.mark.parametrize("site", ["resid_post", "head", "k"])
@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_the_patched_distribution_is_of_the_effect_on_the_map(site, direction):
    effects = looking.exact_map(IOI, site, "probability", direction)
    place = f"{site}@1@10" if site == "resid_post" else f"{site}@1.0"
    table = looking.patched_tokens(IOI, (place,), direction, 1)
    answer = table[table.role == "answer"].iloc[0]
    base = answer.corrupt if direction == "denoise" else answer.clean
    assert answer.patched - base == pytest.approx(looking.effect_at(effects, place)[1], abs=1e-5)


def test_two_places_are_patched_each_by_itself():
    both = looking.patched_tokens(IOI, ("resid_pre@2@7", "head@1.0"), "noise", 0).set_index("token")
    for name, place in (("patched", "resid_pre@2@7"), ("pinned", "head@1.0")):
        alone = looking.patched_tokens(IOI, (place,), "noise", 0).set_index("token")
        common = both.index.intersection(alone.index)
        np.testing.assert_allclose(both[name][common], alone.patched[common], rtol=1e-5)


def test_the_maps_are_the_librarys():
    with locked_model(IOI.model).use() as model:
        pairs = IOI.pairs(model)
        one = activation_patching(model, pairs, "mlp_out", direction="noise")
        heads = activation_patching(model, pairs, "head", positions="all")
    np.testing.assert_array_equal(looking.exact_map(IOI, "mlp_out", "logit_diff", "noise"), one)
    np.testing.assert_array_equal(looking.exact_map(IOI, "head", "logit_diff", "denoise"), heads)


def test_a_place_becomes_the_patch_it_names():
    cfg = locked_model(IOI.model).cfg
    assert looking.patch_of("head@1.2", cfg, 15) == Patch("head", 1, 2, None)
    assert looking.patch_of("resid_pre@1@14", cfg, 15) == Patch("resid_pre", 1, None, 14)


@pytest.mark.parametrize(
    ("place", "sentence"),
    [("m5", "not a cell"), ("nowhere@1@1", "nowhere"), ("resid_pre@99@1", "no layer 99"), ("head@1.99", "no unit 99"),
     ("resid_pre@1.1@1", "no unit 1"), ("resid_pre@1@15", "position 15 is outside")],
)  # fmt: skip
def test_places_are_checked_on_the_server(place, sentence):
    with refused(SiteError, sentence):
        looking.patch_of(place, locked_model(IOI.model).cfg, 15)


def test_a_direction_that_is_none_is_refused():
    with refused(OptionError, "direction"):
        looking.patched_tokens(IOI, ("resid_pre@2@7",), "both", 0)


@pytest.mark.parametrize("metric", list(METRICS))
def test_every_metric_that_is_offered_can_be_mapped(metric):
    if metric in looking.metric_names(True):
        assert np.isfinite(looking.exact_map(IOI, "attn_out", metric, "denoise")).all()
