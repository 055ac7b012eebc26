"""The page Features: its table and card, the functions that turn clicks to latents, and numbers that are the library's own."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest

from app import cards, notebooks, texts
from app import dictionaries as data
from app.behaviour import Behaviour
from app.locked import locked_model
from interp import load_model, load_sae, logit_effects, top_contexts
from interp.bundled import bundled_saes
from interp.errors import LoadError, OptionError, TaskError
from tests.small_pairs import refused

SAE = "mini-gpt2/resid_post2"
HERE = Behaviour(n=2)


def event(*rows: int) -> dict:
    """What a table reports when these rows are selected."""
    return {"selection": {"rows": list(rows), "columns": []}}


# ---------------------------------------------------------------------------------------------------------------------- clicks


def test_a_clicked_row_is_the_id_that_it_shows():
    assert [cards.chosen_row(event(i), [30, 10, 20]) for i in range(3)] == [30, 10, 20]


@pytest.mark.parametrize(
    "stale", [None, {}, event(), event(3), event(-1)], ids=["none", "empty", "no row", "beyond", "negative"]
)
def test_a_stale_click_is_none(stale):
    assert cards.chosen_row(stale, [30, 10, 20]) is None


@pytest.mark.parametrize("place", [None, "", "latent@24", "latent@x", "head@3.1", "m2.n3", "resid_pre@2@7"])
def test_places_that_are_no_latent_of_this_dictionary(place):
    assert cards.latent_of(place, 24) is None


def test_every_latent_has_a_place():
    assert [cards.latent_of(f"latent@{i}", 24) for i in range(24)] == list(range(24))


def test_bars_are_plain_numbers_with_labels_of_their_own():
    spec = cards.token_bars([" a", " a", "\n"], np.array([1.5, -2.0, 0.0], dtype=np.float32), unit="activation")
    assert spec["xAxis"]["data"] == ["0:␣a", "1:␣a", "2:⏎"]
    assert [type(bar["value"]) for bar in spec["series"][0]["data"]] == [float] * 3
    assert [bar["value"] for bar in spec["series"][0]["data"]] == [1.5, -2.0, 0.0]


def test_text_is_no_markdown():
    assert texts.plain("a_b *c* [d](e) <f> :red[g] `h` $i$") == r"a\_b \*c\* \[d\]\(e\) \<f\> \:red\[g\] \`h\` \$i\$"


@pytest.mark.parametrize("token", [" Paris", "a b", "\n  x", "\t"])
def test_tokens_are_typed_as_they_are_drawn(token):
    assert texts.typed(cards.visible(token)) == token


# --------------------------------------------------------------------------------------------------------------------- numbers


def test_contexts_and_effects_are_those_of_the_library():
    model = load_model("mini-gpt2")
    sae = load_sae(bundled_saes()[SAE], model)
    contexts = top_contexts(
        model, sae, data.corpus("mini-gpt2", 50), latents=[114], n=data.N_CONTEXTS, window=data.WINDOW
    )
    pd.testing.assert_frame_equal(data.contexts_of("mini-gpt2", SAE, 50, 114), contexts)
    pd.testing.assert_frame_equal(data.effects("mini-gpt2", SAE, 114), logit_effects(model, sae, [114], k=10))


def test_the_code_of_a_prompt_is_that_of_its_tokens():
    tokens, codes = data.prompt_codes(HERE, 1, SAE)
    model = load_model("mini-gpt2")
    sae, pairs = load_sae(bundled_saes()[SAE], model), HERE.pairs(model)
    _, cache = model.run_with_cache(pairs.clean[1:2])
    expected = sae.encode(cache[sae.hook][0]).detach().numpy()
    assert len(tokens) == len(codes) == int(pairs.lengths[1])
    np.testing.assert_allclose(codes, expected[: len(tokens)], rtol=1e-4, atol=1e-4)


def test_latents_are_listed_once_with_their_best_context():
    rows = data.latent_table(HERE, 0, SAE, 50)
    best = data.contexts("mini-gpt2", SAE, 50).query("rank == 0")
    assert rows["latent"].is_unique
    assert rows["strongest"].tolist() == best["value"].tolist()
    _, codes = data.prompt_codes(HERE, 0, SAE)
    assert rows["prompt"].tolist() == np.abs(codes)[1:].max(0)[rows["latent"]].tolist()


def test_snmf_is_a_dictionary_too():
    snmf = data.dictionary("mini-gpt2", "snmf/1")
    assert snmf.hook == "blocks.1.mlp.hook_post"
    assert snmf.n_features == data.SNMF_OPTIONS["n_features"] == len(snmf.components_)
    assert set(data.effects("mini-gpt2", "snmf/1", 3)["side"]) == {"top", "bottom"}


def test_the_server_refuses_what_is_not_there():
    with refused(LoadError, "dictionary of mini-gpt2"):
        data.dictionary("mini-gpt2", "mini-llama/resid_post2")
    with refused(LoadError, "dictionary of mini-gpt2"):
        data.dictionary("mini-gpt2", str(bundled_saes()[SAE]))  # a folder that nobody configured
    with refused(LoadError, "dictionary of mini-gpt2"):
        data.dictionary("mini-gpt2", "snmf/4")
    with refused(OptionError, "latents 0 to 1023, not 1024"):
        data.effects("mini-gpt2", SAE, 1024)
    with refused(OptionError, "1 to 500 texts, not 501"):
        data.corpus("mini-gpt2", 501)
    with refused(TaskError, "prompts 0 to 1, not 2"):
        data.prompt_codes(HERE, 2, SAE)
    with refused(OptionError, "this is an SNMF"):
        data.zf("mini-gpt2", "snmf/1")


def test_folders_are_offered_once_they_are_configured(monkeypatch):
    folder = bundled_saes()[SAE].parent
    monkeypatch.setenv("INTERP_APP_FOLDERS", str(folder))
    assert str(folder / "resid_post2") in data.sources("mini-gpt2")
    assert data.dictionary("mini-gpt2", str(folder / "resid_post2")).n_features == 1024


def test_sessions_that_compute_at_once_wait_for_one_another():
    """Each needs what another computes, and the model: whoever held the model while waiting would stop both."""
    alone = data.prompt_codes(HERE, 0, SAE)[1], data.latent_table(HERE, 0, SAE, 50)
    for function in (data.dictionary, data.corpus, data.contexts, data.prompt_codes, data.latent_table):
        function.clear()
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(data.prompt_codes, HERE, 0, SAE), pool.submit(data.latent_table, HERE, 0, SAE, 50),
                pool.submit(data.contexts, "mini-gpt2", SAE, 50), pool.submit(data.effects, "mini-gpt2", SAE, 1)]  # fmt: skip
        codes, table = jobs[0].result(timeout=60)[1], jobs[1].result(timeout=60)
    assert np.array_equal(codes, alone[0])
    pd.testing.assert_frame_equal(table, alone[1])


def test_no_hook_stays_on_the_model():
    data.contexts("mini-gpt2", SAE, 50)
    with locked_model("mini-gpt2").use() as model:
        assert not [name for name, point in model.hook_dict.items() if point.fwd_hooks or point.bwd_hooks]


# ------------------------------------------------------------------------------------------------------------------------ page


def test_it_opens_on_a_latent_of_the_prompt(page):
    at = page("features", n="2", texts="50")
    shown = at.dataframe[0].value
    assert "999" in at.caption[0].value or "of 1,024" in at.caption[0].value
    assert shown["prompt"].is_monotonic_decreasing
    assert at.subheader[0].value == f"Latent {shown['latent'].iloc[0]}"


def test_an_address_opens_its_latent(page):
    at = page("features", n="2", texts="50", at="latent@27")
    assert at.subheader[0].value == "Latent 27"
    assert at.number_input(key="latent").value == 27
    at.number_input(key="latent").set_value(30).run()
    assert at.subheader[0].value == "Latent 30"
    assert at.query_params["at"] in ("latent@30", ["latent@30"])


def test_search_and_its_empty_state(page):
    at = page("features", n="2", texts="50")
    at.text_input(key="find").set_value("year").run()
    assert at.dataframe[0].value["token"].str.contains("year").all()
    at.text_input(key="find").set_value("<script>").run()
    assert "No latent's token contains this" in at.info[0].value
    assert not at.exception


def test_other_dictionaries(page):
    at = page("features", n="2", texts="50")
    for source in ("snmf/1", "mini-gpt2/transcoder1"):
        at.selectbox(key="source").set_value(source).run()
        assert not at.exception
        assert not at.error
        assert at.subheader[0].value.split()[0] == ("Feature" if source == "snmf/1" else "Latent")


def test_tables_and_code_are_taken_home(page):
    at = page("features", n="2", texts="50", at="latent@27")
    labels = [button.label for button in at.get("download_button")]
    assert labels == ["Latents (CSV)", "Latents (parquet)", "Contexts (CSV)", "Contexts (parquet)", "Notebook (.py)"]


@pytest.mark.parametrize(("source", "latent"), [(SAE, 114), ("snmf/1", 3)])
def test_the_code_makes_what_the_page_shows(source, latent, capsys):
    lines = notebooks.latent_code(source, 50, latent).splitlines()
    names: dict = {}
    exec(HERE.code() + "\n".join([*lines[:-1], f"effects = {lines[-1]}"]), names)
    capsys.readouterr()
    pd.testing.assert_frame_equal(names["effects"], data.effects("mini-gpt2", source, latent))
    own = names["contexts"].query("latent == @latent").reset_index(drop=True)
    pd.testing.assert_frame_equal(own, data.contexts_of("mini-gpt2", source, 50, latent))


def test_where_the_way_to_the_logits_is_not_fixed_the_code_leaves_it_out():
    assert "effects" not in notebooks.latent_code(SAE, 50, 1, writes=False)


def test_the_zf_plot_is_drawn_on_demand(page):
    at = page("features", n="2", texts="50")
    assert not at.get("plotly_chart")
    at.toggle(key="zf").set_value(True).run()
    assert not at.exception
    assert len(at.get("plotly_chart")) == 1


def test_another_model_has_other_dictionaries(page):
    at = page("features", n="2", texts="50", source="mini-gpt2/transcoder1")
    at.selectbox(key="form_model").set_value("mini-llama")
    at.button(key="form_submit").click().run()
    at.run()  # the form is drawn before the page, and is of the model before
    assert not at.exception
    assert not at.error
    assert at.selectbox(key="source").value.startswith(("mini-llama/", "snmf/"))
