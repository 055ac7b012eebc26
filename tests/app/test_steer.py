"""The page Steer: recipes, strengths, texts and scores; the code that it exports gives the numbers that it shows."""

import re

import numpy as np
import pandas as pd
import pytest

import interp
from app import steered
from app.cards import HANDED
from app.steered import DOWN, UP, Recipe
from interp.errors import OptionError, TaskError
from tests.small_pairs import refused

SAE = "mini-gpt2/resid_post2"
RECIPES = {
    "texts": Recipe("two texts", layer=2, positive=("She was late.", "Anna said that she was glad."), negative=("He was late.",)),
    "sae": Recipe("latent", source=SAE, index=114),
    "snmf": Recipe("latent", source="snmf/1", index=2),
    "neuron": Recipe("neuron", layer=3, index=490),
}  # fmt: skip
DRAWING = ("all", 2, 6, 1.0, 0)
ITEMS = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())


@ITEMS
def test_exported_code_gives_what_is_shown(recipe):
    concept = tuple(steered.promoted("mini-gpt2", recipe).values())[:3]
    reached = steered.strengths("mini-gpt2", recipe, "The friends", 0.1, "all").set_index("sign")["alpha"]
    strength = (float(reached[1]), float(reached[-1]))
    shown = steered.texts("mini-gpt2", recipe, "The friends", strength, *DRAWING, concept)
    code = steered.code(recipe, "The friends", strength, 0.1, *DRAWING, concept)
    names: dict = {"interp": interp, "model": interp.load_model("mini-gpt2")}
    exec(compile(code, "exported", "exec"), names)
    pd.testing.assert_frame_equal(names["written"], shown)
    pd.testing.assert_series_equal(names["strength"].set_index("sign")["alpha"], reached)


@ITEMS
def test_both_signs_are_beside_the_model_left_alone(recipe):
    shown = steered.texts("mini-gpt2", recipe, "The friends", (5.0, 5.0), *DRAWING, ())
    assert list(dict.fromkeys(shown["name"])) == ["unsteered", UP, DOWN]
    assert len(shown) == 6
    alone = shown[shown["name"] == "unsteered"]
    np.testing.assert_allclose(alone["logprob_steered"], alone["logprob_unsteered"], rtol=1e-4)


def test_a_strength_that_is_not_reached_is_left_out():
    shown = steered.texts("mini-gpt2", RECIPES["neuron"], "The friends", (None, 3.0), *DRAWING, ())
    assert set(shown["name"]) == {"unsteered", DOWN}
    assert (
        UP
        not in steered.code(RECIPES["neuron"], "The friends", (None, 3.0), None, *DRAWING, ()).split("side_by_side")[1]
    )


def test_scores_are_means_of_the_librarys():
    concept = tuple(steered.promoted("mini-gpt2", RECIPES["sae"]).values())[:3]
    shown = steered.texts("mini-gpt2", RECIPES["sae"], "The friends", (20.0, 20.0), *DRAWING, concept)
    own = interp.steering_scores(shown).groupby("name")["concept"].mean()
    table = steered.scores(shown).set_index("name")
    assert table["concept"].to_dict() == own.to_dict()
    assert table.loc[UP, "concept"] > table.loc["unsteered", "concept"]


def test_the_server_refuses_what_is_out_of_range():
    with refused(OptionError, "1 to 8 texts"):
        steered.texts("mini-gpt2", RECIPES["neuron"], "The", (1.0, 1.0), "all", 9, 6, 1.0, 0, ())
    with refused(OptionError, "not neuron 512 of layer 3"):
        steered.length("mini-gpt2", Recipe("neuron", layer=3, index=512))
    with refused(OptionError, "latents 0 to 1023"):
        steered.length("mini-gpt2", Recipe("latent", source=SAE, index=-1))
    with refused(TaskError, "at least one negative text"):
        steered.length("mini-gpt2", Recipe("two texts", positive=("a",)))
    with refused(TaskError, "characters"):
        steered.texts("mini-gpt2", RECIPES["neuron"], "a" * 3000, (1.0, 1.0), *DRAWING, ())
    with refused(TaskError, "not one"):
        steered.token_ids("mini-gpt2", (" the house",))
    with refused(OptionError, "kind of vector"):
        steered.length("mini-gpt2", Recipe("else"))


# ------------------------------------------------------------------------------------------------------------------------ page


def test_it_opens_with_texts_and_scores(page):
    at = page("steer", n="2", n_samples="2", new_tokens="6")
    assert [part.value for part in at.subheader] == ["unsteered", f"steered {UP}", f"steered {DOWN}"]
    assert sum(text.value.startswith("The friends") for text in at.text) == 6
    assert [metric.label for metric in at.metric] == [f"Strength {UP}", f"Strength {DOWN}"]
    assert all(re.match(r"KL 0\.2[45]", metric.delta) for metric in at.metric)
    assert list(at.dataframe[0].value["name"]) == ["unsteered", UP, DOWN]


@pytest.mark.parametrize("kind", ["SAE latent", "SNMF feature", "neuron"])
def test_other_vectors(page, kind):
    at = page("steer", n_samples="1", new_tokens="4", vector=kind)
    assert at.get("button_group")[0].value in (kind, [kind])
    assert not at.error
    assert "Promotes most" in at.text[0].value


def test_strength_by_hand(page):
    at = page("steer", n_samples="1", new_tokens="4", way="by hand", alpha="12.0")
    assert not at.metric
    assert at.number_input(key="alpha").value == 12.0
    assert len(at.subheader) == 3


def test_no_concept_says_what_to_do(page):
    at = page("steer", n_samples="1", new_tokens="4")
    at.multiselect[0].set_value([]).run()
    assert "Choose concept tokens" in at.info[0].value


@pytest.mark.parametrize("name", ["sae", "snmf", "neuron"])
def test_another_page_hands_over_its_vector(page, name):
    recipe = RECIPES[name]
    at = page("steer", n_samples="1", new_tokens="4")
    at.session_state[HANDED] = recipe
    at.run()
    assert not at.exception
    fields = {"sae": {"vector_latent": 114}, "snmf": {"vector_layer": 1, "vector_feature": 2},
              "neuron": {"vector_layer": 3, "vector_neuron": 490}}[name]  # fmt: skip
    assert {key: at.number_input(key=key).value for key in fields} == fields


def test_the_button_of_a_latent_opens_this_page(page):
    at = page("features", n="2", texts="50", at="latent@27")
    at.button(key="steer_with").click().run()
    assert not at.exception
    assert at.title[0].value == "Steer"
    assert at.number_input(key="vector_latent").value == 27
    assert at.query_params["at"] in ("latent@27", ["latent@27"])


def test_a_vector_of_another_model_is_not_kept(page):
    at = page("steer", n_samples="1", new_tokens="4", vector="SAE latent", vector_source="mini-gpt2/transcoder1")
    at.selectbox(key="form_model").set_value("mini-llama")
    at.button(key="form_submit").click().run()
    at.run()
    assert not at.exception
    assert not at.error
    assert at.selectbox(key="vector_source").value.startswith("mini-llama/")
