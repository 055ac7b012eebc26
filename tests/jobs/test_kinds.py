"""Every kind of job is the library's own function: its options, its numbers, its files."""

import pytest
import xarray as xr

from interp import SNMF, load_task
from interp.circuits.edges import edge_scores
from interp.circuits.evaluate import faithfulness_curve
from interp.errors import OptionError
from interp.jobs.kinds import KINDS, Output, circuit, options_of, snmf
from tests.small_pairs import refused

HOOK = "blocks.0.mlp.hook_post"


def test_options_are_the_analysis_own():
    assert "window" in options_of("patch")
    assert "rules" in options_of("attribute")
    assert "sites" not in options_of("edges")
    assert {"method", "target"} <= {*options_of("circuit")}
    assert "held_out" in options_of("sae")
    assert "held_out" not in options_of("circuit"), "pairs to judge by are drawn, not given"


@pytest.mark.parametrize("kind", KINDS)
def test_how_a_job_runs_is_no_option(kind):
    assert not {"model", "pairs", "seed", "batch_size", "announce", "progress", "max_memory"} & {*options_of(kind)}


def test_an_unknown_kind_is_refused_with_the_nearest():
    with refused(OptionError, "'snfm' is not a kind of job .* did you mean 'snmf'"):
        options_of("snfm")


def test_a_circuit_is_judged_on_the_held_out_pairs(mini_gpt2):
    pairs, held_out = load_task("ioi", mini_gpt2, n=4), load_task("ioi", mini_gpt2, n=4, seed=9)
    found = circuit(mini_gpt2, pairs, held_out, method="eap", n_resamples=5)
    measured = {"metric": pairs.metric, "ablation": "corrupt"}
    scores = edge_scores(mini_gpt2, pairs, method="eap", metric=pairs.metric, direction="noise")
    curve = faithfulness_curve(mini_gpt2, held_out, scores, seed=0, **measured)
    assert found[[*curve.data_vars]].drop_attrs().identical(curve.drop_attrs())
    assert found.attrs["held_out"] == 1
    assert circuit(mini_gpt2, pairs, None, method="eap", n_resamples=5).attrs["held_out"] == 0
    assert found.smallest_faithfulness >= 0.9
    assert 0 <= found.smallest_stability <= 1


def test_elimination_takes_no_rules(mini_gpt2):
    with refused(OptionError, "elimination follows no rules"):
        circuit(mini_gpt2, load_task("ioi", mini_gpt2, n=2), None, method="eliminate", steps=3)


def test_what_a_dictionary_learned_is_loaded_as_the_library_does(mini_gpt2, tmp_path):
    found = snmf(mini_gpt2, hook=HOOK, n_features=3, max_iter=2, n_texts=4)
    assert isinstance(found, Output)
    for name, content in found.files.items():
        (tmp_path / name).write_bytes(content)
    assert SNMF.load(tmp_path).components_.shape[0] == 3
    assert isinstance(found.scores, xr.Dataset)
    assert found.scores.attrs["hook"] == HOOK
    again = snmf(mini_gpt2, hook=HOOK, n_features=3, max_iter=2, n_texts=4)
    assert again.scores.identical(found.scores)
    assert again.files == found.files, "the same question has the same bytes"
