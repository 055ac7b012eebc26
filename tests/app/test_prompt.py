"""The page Prompt: it runs, says what the library says, and keeps to what it is asked."""

import numpy as np
import pytest
import torch

from app import looking
from app.behaviour import OWN, Behaviour
from app.locked import locked_model
from app.tables import code
from interp import logit_lens
from interp.errors import OptionError, SiteError, TaskError
from tests.small_pairs import refused

IOI = Behaviour(n=3)


@pytest.fixture(scope="module")
def model_and_pairs():
    with locked_model(
        IOI.model
    ).use() as model:  # not for longer: pages of these tests, in threads of their own, wait for it
        return model, IOI.pairs(model)


def captions(at) -> str:
    return " ".join(c.value for c in at.caption)


def test_the_page_opens_with_the_tokens_of_the_first_pair(page):
    at = page("prompt")
    assert at.title[0].value == "Prompt"
    assert "Answer: `␣" in captions(at)
    assert len(at.get("echarts_chart")) == 2  # lens and one head
    assert "✓ answer" in at.dataframe[0].value["role"].tolist()


def test_the_address_sets_pair_run_and_cell(page):
    at = page("prompt", n="3", pair="2", run="corrupt", at="resid_pre@1@3")
    assert at.selectbox(key="pair").value == 2
    assert at.segmented_control(key="run").value == "corrupt"
    assert any("after 1 of" in m.value and "position 3" in m.value for m in at.markdown)


@pytest.mark.parametrize("place", ["resid_pre@99@3", "resid_pre@1@999", "nonsense", "m1"])
def test_a_place_that_is_not_there_is_the_end_of_the_prompt(page, place):
    at = page("prompt", n="3", at=place)
    assert "now it is where the answer is read" in captions(at)


def test_a_pair_left_over_from_more_is_the_first(page):
    at = page("prompt", n="8", pair="7")
    at.number_input(key="form_n").set_value(2)
    at.button[0].click().run()
    assert not at.exception
    assert at.selectbox(key="pair").value == 0


def test_relevance_and_all_heads_come_on_demand(page):
    at = page("prompt", n="3", colour="relevance", all_heads="true")
    assert "Blue raises the metric" in captions(at)
    assert len(at.get("echarts_chart")) == 3


def test_own_prompts_are_looked_at(page):
    at = page("prompt", task=OWN)
    assert not at.error
    assert at.selectbox(key="pair").options == ["0"]
    assert "Answer: `␣Mary`; wrong: `␣John`" in captions(at)


def test_tokens_with_markup_are_text(page):
    strip = page("prompt", n="3").get("html")[0].proto.body
    assert "&lt;|endoftext|&gt;" in strip
    assert "<|" not in strip


def test_words_that_the_model_lacks_are_one_sentence(page):
    at = page("prompt", task=OWN, clean="a <script> Mary", corrupt="a <script> John", answer=" Mary", wrong=" John")
    assert len(at.error) == 1
    assert not at.get("html")


def test_own_prompts_of_unequal_length_are_one_sentence(page):
    at = page("prompt", task=OWN, clean="one two three", corrupt="one two", answer=" Mary", wrong=" John")
    assert len(at.error) == 1


# ------------------------------------------------------------------------------------------------- what it computes


def test_next_tokens_are_probabilities_of_either_run(model_and_pairs):
    model, pairs = model_and_pairs
    table = looking.next_tokens(IOI, 1, k=5)
    with torch.no_grad():
        right = model(pairs.clean)[1, pairs.read_at[1]].softmax(-1)
    for row in table.itertuples():
        assert row.clean == pytest.approx(right[model.to_single_token(row.token)].item(), rel=1e-4, abs=1e-7)
    np.testing.assert_allclose(table["clean"] - table["corrupt"], table["clean − corrupt"])
    assert {"answer", "wrong answer"} <= set(table.role)


def test_decoding_the_last_layer_at_the_end_is_the_next_token(model_and_pairs):
    model, pairs = model_and_pairs
    last = looking.decoded(IOI, 1, "clean", model.cfg.n_layers, int(pairs.read_at[1]), k=5).set_index("token")
    after = looking.next_tokens(IOI, 1, k=5).set_index("token")
    both = last.index.intersection(after.index)  # the other table has the likeliest of the corrupt run too
    assert {after.clean.idxmax()} <= set(both)
    np.testing.assert_allclose(last.probability[both], after.clean[both], rtol=1e-4, atol=1e-7)
    assert last["rank"].is_monotonic_increasing


def test_the_likeliest_tokens_are_the_first_rows_of_their_cells():
    texts, shares = looking.lens_tokens(IOI, 0, "corrupt")
    for layer, position in [(0, 2), (2, 5), (len(texts) - 1, texts.shape[1] - 1)]:
        first = looking.decoded(IOI, 0, "corrupt", layer, position, k=1).iloc[0]
        assert first.token == texts[layer, position]
        assert first.probability == pytest.approx(shares[layer, position], rel=1e-4)


def test_the_lens_is_the_librarys(model_and_pairs):
    np.testing.assert_array_equal(
        looking.lens(IOI, "clean", "probability"), logit_lens(*model_and_pairs, metric="probability")
    )


def test_patterns_are_causal_and_sum_to_one():
    values = looking.patterns(IOI, 2, "clean", 1)
    np.testing.assert_allclose(values.sum(-1), 1, atol=1e-5)
    assert not np.triu(values, 1).any()


def test_what_is_not_there_is_refused_on_the_server():
    with refused(TaskError, "no pair 3"):
        looking.next_tokens(IOI, 3)
    with refused(SiteError, "not after 99"):
        looking.decoded(IOI, 0, "clean", 99, 0)
    with refused(SiteError, "position 99 is outside"):
        looking.decoded(IOI, 0, "clean", 0, 99)
    with refused(SiteError, "no layer 99"):
        looking.patterns(IOI, 0, "clean", 99)
    with refused(OptionError, "run"):
        looking.lens_tokens(IOI, 0, "sideways")


def test_no_hook_stays_on_the_model(model_and_pairs):
    model, _ = model_and_pairs
    looking.relevance(IOI, "clean", "logit_diff")
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())


def test_metrics_without_wrong_answers_do_without():
    assert looking.metric_names(True)[0] == "logit_diff"
    assert "logit_diff" not in looking.metric_names(False)
    assert "probability" in looking.metric_names(False)


@pytest.mark.parametrize(("token", "text"), [(" a", "`␣a`"), ("`", "`` ` ``"), ("a``b", "``` a``b ```")])
def test_a_token_in_markdown_is_code(token, text):
    assert code(token) == text


def test_a_cell_is_chosen_without_a_mouse(page):
    at = page("prompt", n="2")
    assert at.selectbox(key="lens_cell_row").value is None
    at.selectbox(key="lens_cell_row").set_value(2).run()
    last = len(at.selectbox(key="lens_cell_column").options) - 1
    assert at.selectbox(key="lens_cell_column").value == last, "the place where the answer is read"
    assert any(f"after 2 of 4 layers, position {last}" in text.value for text in at.markdown)
    at.selectbox(key="lens_cell_column").set_value(3).run()
    assert at.query_params["at"] in ("resid_pre@2@3", ["resid_pre@2@3"])


def test_an_address_moves_the_menus_of_the_cell(page):
    at = page("prompt", n="2", at="resid_pre@1@4")
    assert [at.selectbox(key=f"lens_cell_{field}").value for field in ("row", "column")] == [1, 4]
