"""The page Neurons: search, the card, clamps; numbers that are the library's own; clicks on its table."""

import numpy as np
import pandas as pd
import pytest

from app import cards, notebooks
from app import dictionaries as data
from app.behaviour import OWN, Behaviour
from interp import clamp_effect, clamp_test, decode_neurons, find_neurons, load_model
from interp.errors import OptionError, SiteError, TaskError
from tests.small_pairs import refused

HERE = Behaviour(n=4)


@pytest.fixture(scope="module")
def model():
    """A model of our own, beside the dashboard's."""
    return load_model("mini-gpt2")


@pytest.mark.parametrize("place", [None, "", "m4.n0", "m0.n512", "m1", "a1.h2", "xm1.n2", "m1.n2x", "latent@3"])
def test_places_that_are_no_neuron_of_this_model(place):
    assert cards.neuron_of(place, 4, 512) is None


def test_every_neuron_has_a_place():
    assert [cards.neuron_of(f"m{layer}.n{n}", 2, 3) for layer in range(2) for n in range(3)] == [
        (0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2),
    ]  # fmt: skip


def test_the_table_has_a_row_for_each_neuron(model):
    table = data.neuron_table("mini-gpt2", "down", None)
    assert len(table) == model.cfg.n_layers * model.cfg.d_mlp == len(table.drop_duplicates(["layer", "neuron"]))
    assert table["kurtosis"].is_monotonic_decreasing
    row = table.iloc[0]
    own = decode_neurons(
        model, matrix="down", layers=[int(row["layer"])], neurons=[int(row["neuron"])], k=8, kurtosis=True
    )
    assert row["+"].split("  ") == [cards.visible(token) for token in own.query("pole == '+'")["token"]]
    assert row["kurtosis"] == pytest.approx(own["kurtosis"].iloc[0], rel=1e-5)


def test_a_layer_alone_is_the_same_as_in_all():
    of_all = data.neuron_table("mini-gpt2", "up", None).query("layer == 1").reset_index(drop=True)
    pd.testing.assert_frame_equal(data.neuron_table("mini-gpt2", "up", 1), of_all)


def test_large_models_are_decoded_by_the_layer(monkeypatch):
    assert data.layer_choices("mini-gpt2") == [None, 0, 1, 2, 3]
    monkeypatch.setattr(data, "MAX_NEURONS", 2000)
    assert data.layer_choices("mini-gpt2") == [0, 1, 2, 3]
    with refused(OptionError, "so many neurons at once: choose a layer"):
        data.decoded("mini-gpt2", None, 3)


def test_search_is_that_of_the_library(model):
    own = find_neurons(
        decode_neurons(model, k=8, matrix=("up", "down"), kurtosis=True), " Paris", matrix="down", k=None
    )
    found = data.search("mini-gpt2", "down", None, " Paris")
    assert (
        found[["layer", "neuron", "rank"]].to_numpy().tolist() == own[["layer", "neuron", "rank"]].to_numpy().tolist()
    )
    with refused(OptionError, "did you mean ' Paris'"):
        data.search("mini-gpt2", "down", None, " paris")


def test_contexts_of_both_signs_are_the_strongest_of_each():
    gated = data.neuron_contexts("mini-llama", 2, 17, 50)
    model, corpus = load_model("mini-llama"), data.corpus("mini-llama", 50)
    hook = "blocks.2.mlp.hook_post"
    _, cache = model.run_with_cache(corpus.tokens)
    values = np.where(corpus.mask().numpy(), cache[hook][:, :, 17].numpy(), np.nan)
    largest = np.sort(np.nanmax(values, 1))[::-1][: data.N_CONTEXTS]
    smallest = np.sort(np.nanmin(values, 1))[: data.N_CONTEXTS]
    np.testing.assert_allclose(gated["+"]["value"], largest, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(gated["-"]["value"], smallest, rtol=1e-4, atol=1e-5)


def test_clamps_are_those_of_the_library(model):
    texts = data.prompt_texts(HERE)
    pairs = HERE.pairs(model)
    assert model.to_tokens(texts[0])[0].tolist() == pairs.clean[0, : int(pairs.lengths[0])].tolist()
    own = clamp_effect(model, texts[1], {(3, 490): 6.0}, k=10)
    pd.testing.assert_frame_equal(data.clamped(HERE, 1, 3, 490, 6.0), own[["token", "before", "after", "difference"]])
    test = clamp_test(model, texts, " the", {(3, 490): -1.0}, controls=3)
    assert str(data.compared(HERE, 3, 490, -1.0, " the", "post", controls=3)) == str(test)


def test_the_prompt_of_ones_own_is_what_was_typed():
    own = Behaviour(task=OWN)
    assert data.prompt_texts(own) == [own.clean]


def test_the_server_refuses_what_is_not_there():
    with refused(SiteError, "neurons in a layer 0 to 511, not 512"):
        data.neuron_on_prompt(HERE, 0, 3, 512)
    with refused(SiteError, "layers 0 to 3, not 4"):
        data.neuron_contexts("mini-gpt2", 4, 0, 50)
    with refused(OptionError, "matrix of mini-gpt2"):
        data.neuron_table("mini-gpt2", "gate", None)
    with refused(TaskError, "prompts 0 to 3, not -1"):
        data.clamped(HERE, -1, 3, 490, 1.0)
    with refused(SiteError, "no gates"):
        data.clamped(HERE, 0, 3, 490, 1.0, "gate")


# ------------------------------------------------------------------------------------------------------------------------ page


def test_it_opens_on_the_first_neuron_of_the_table(page):
    at = page("neurons", n="2")
    row = at.dataframe[0].value.iloc[0]
    assert at.subheader[0].value == f"m{row['layer']}.n{row['neuron']}"
    assert "Showing 500 of 2,048 neurons" in at.caption[0].value


def test_an_address_opens_its_neuron(page):
    at = page("neurons", n="2", at="m1.n17", matrix="up")
    assert at.subheader[0].value == "m1.n17"
    at.number_input(key="neuron").set_value(18).run()
    assert at.subheader[0].value == "m1.n18"
    assert at.query_params["at"] in ("m1.n18", ["m1.n18"])


def test_a_place_of_another_model_is_not_opened(page):
    at = page("neurons", n="2", at="m17.n9000")
    assert at.subheader[0].value != "m17.n9000"


def test_search_hints_and_finds(page):
    at = page("neurons", n="2")
    at.text_input(key="token").set_value("paris").run()
    assert "did you mean" in at.info[0].value
    assert not at.exception
    at.text_input(key="token").set_value("␣Paris").run()
    assert not at.exception
    assert {"pole", "rank", "score"} <= set(at.dataframe[0].value.columns)


def test_holding_and_testing(page):
    at = page("neurons", n="3", at="m3.n490")
    value = next(slider for slider in at.slider if slider.key.startswith("value_3_490"))
    value.set_value(value.min).run()
    assert not at.exception
    at.button(key="test").click().run()
    assert not at.exception
    assert not at.error
    assert any("others held at the same value" in caption.value for caption in at.caption)


def test_tables_and_code_are_taken_home(page):
    at = page("neurons", n="2", at="m3.n490")
    labels = [button.label for button in at.get("download_button")]
    assert labels == ["Neurons (CSV)", "Neurons (parquet)", "Tokens of m3.n490 (CSV)", "Tokens of m3.n490 (parquet)",
                      "Notebook (.py)"]  # fmt: skip


def test_the_code_makes_what_the_page_shows(capsys):
    text = data.prompt_texts(HERE)[1]
    code = notebooks.neuron_code("mini-gpt2", (3, 490), prompt=text, value=6.0, site="post", search=" Paris", layer=3)
    lines, names = code.splitlines(), {}
    exec(HERE.code() + "\n".join([*lines[:-1], f"effect = {lines[-1]}"]), names)
    assert " Paris" in capsys.readouterr().out
    columns = ["token", "before", "after", "difference"]
    pd.testing.assert_frame_equal(names["effect"][columns], data.clamped(HERE, 1, 3, 490, 6.0))


def test_a_gated_model_has_gates(page):
    at = page("neurons", n="2", model="mini-llama")
    assert list(at.get("button_group")[0].options) == ["up", "gate", "down"]
    assert any("negative" in text.value for text in at.markdown)


def test_a_matrix_of_another_model_is_not_kept(page):
    at = page("neurons", n="2", model="mini-llama", matrix="gate", layers="4", at="m4.n300")
    assert at.subheader[0].value == "m4.n300"
    at.selectbox(key="form_model").set_value("mini-gpt2")
    at.button(key="form_submit").click().run()
    at.run()
    assert not at.exception
    assert not at.error
    assert at.subheader[0].value != "m4.n300"
