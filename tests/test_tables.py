"""Effects as text and as files: every score is there, once, with what it means."""

import numpy as np
import pandas as pd
import pytest

from interp import activation_patching
from interp.tables import save_effects, strongest
from tests.small_pairs import small_pairs


@pytest.fixture(scope="module")
def pairs():
    return small_pairs(n=2, lengths=[6, 4])


def test_the_strongest_come_first(tiny, pairs):
    found = activation_patching(tiny("gpt2"), pairs, ["attn_out", "head"], direction="noise")
    lines = strongest(found, n=3).splitlines()
    assert lines[0].startswith("gpt2 on random (given), noise, logit_diff [logits], mean over 2 prompts")
    assert "metric(patched) - metric(clean)" in lines[0]
    start = lines.index("attn_out")
    shown = [float(line.split()[-1]) for line in lines[start + 2 : start + 5]]
    expected = found.attn_out.mean("prompt").values.flatten()
    expected = expected[np.argsort(-np.abs(expected))][:3]
    np.testing.assert_allclose(shown, expected, atol=6e-5)
    assert "head_out" in lines
    assert "a2.h" in strongest(found) or "a1.h" in strongest(found) or "a0.h" in strongest(found)
    assert len(lines) == 1 + 2 * (2 + 1 + 3)


def test_one_site_has_its_name_and_its_tokens(tiny, pairs):
    text = strongest(activation_patching(tiny("gpt2"), pairs, "resid_pre"))
    assert "\nresid_pre\n" in text
    assert "␣w" in text
    assert "nan" not in text.lower()


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("sites", ["resid_pre", ["head", "k", "pattern"]], ids=["one", "several"])
def test_every_score_is_in_the_file_once(tiny, pairs, tmp_path, suffix, sites):
    found = activation_patching(tiny("llama3"), pairs, sites)
    path = save_effects(found, tmp_path / f"scores{suffix}")
    table = pd.read_csv(path) if suffix == ".csv" else pd.read_parquet(path)
    arrays = {"resid_pre": found} if sites == "resid_pre" else dict(found.data_vars)
    assert set(table.site) == set(arrays)
    for name, array in arrays.items():
        rows = table[table.site == name]
        assert len(rows) == int(array.notnull().sum())
        assert not rows.duplicated(list(array.dims)).any()
        for _, row in rows.sample(5, random_state=0).iterrows():
            assert row.effect == pytest.approx(float(array.sel({d: row[d] for d in array.dims})), abs=1e-6)
    assert {"metric_clean", "metric_corrupt", "token"} <= set(table.columns)


def test_windows_go_to_a_file_with_their_sums(tiny, pairs, tmp_path):
    found = activation_patching(tiny("gpt2"), pairs, "mlp_out", window=2)
    table = pd.read_csv(save_effects(found, tmp_path / "w.csv"))
    assert set(table.site) == {"mlp_out", "mlp_out_summed"}


def test_a_heatmap_is_a_page_that_fetches_nothing(tiny, pairs, tmp_path):
    page = save_effects(activation_patching(tiny("gpt2"), pairs, "resid_pre"), tmp_path / "h.html").read_text()
    assert "<script src=" not in page
    assert "<link href=" not in page
    assert "resid_pre" in page
    assert page.rstrip().endswith("</html>")


def test_a_table_that_cannot_be_written_leaves_nothing(tiny, pairs, tmp_path, monkeypatch):
    found = activation_patching(tiny("gpt2"), pairs, "resid_pre")

    def fails(*args):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fails)
    for suffix in (".csv", ".parquet", ".html"):
        with pytest.raises(OSError, match="disk full"):
            save_effects(found, tmp_path / f"scores{suffix}")
    assert list(tmp_path.iterdir()) == []
