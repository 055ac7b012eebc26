"""Continuations side by side.

Held against: `generate` under the same changes, log probabilities of whole runs, masses read position by position.
"""

import pytest
import torch

from interp.errors import OptionError, TaskError
from interp.steering.changes import Change, steer
from interp.steering.generation import continuation, side_by_side
from interp.steering.vectors import neuron_vector
from tests.small_pairs import refused

IDS = torch.tensor([1, 5, 7, 4, 9])
HOOK = "blocks.1.hook_resid_post"
CONCEPT = [7, 12, 40]


def direction(seed: int = 0) -> torch.Tensor:
    return torch.randn(32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def changes() -> dict:
    return {
        "up": [Change(HOOK, direction(), "add", 6.0)],
        "last": [Change(HOOK, direction(), "add", 6.0, "last"), Change(HOOK, direction(1), "ablate")],
        "none": [],
    }


def test_every_variant_is_what_generate_writes(tiny, changes):
    model = tiny("llama", torch.float64)
    options = {"temperature": 1.3, "top_k": 20, "top_p": 0.8, "seed": 4}
    table = side_by_side(model, IDS, changes, n=3, max_new_tokens=7, **options)
    assert table.columns.tolist() == ["name", "sample", "text", "ids", "logprob_steered", "logprob_unsteered"]
    assert table["name"].tolist() == [name for name in ("unsteered", "up", "last", "none") for _ in range(3)]
    assert table["sample"].tolist() == [0, 1, 2] * 4
    for name, rows in table.groupby("name"):
        with steer(model, changes.get(name, [])):
            expected = model.generate(IDS.expand(3, -1), 7, **options)[:, 5:]
        for ids, full in zip(rows["ids"], expected.tolist(), strict=True):
            assert ids == full[: len(ids)]
            assert set(full[len(ids) :]) <= {model.tokenizer.eos_token_id}
    texts = table.set_index(["name", "sample"])["text"]
    assert texts["unsteered"].tolist() == texts["none"].tolist()
    assert texts["unsteered"].tolist() != texts["up"].tolist()


def test_log_probabilities_and_masses_are_those_of_whole_runs(tiny, changes):
    model = tiny("gpt2", torch.float64)
    table = side_by_side(model, IDS, changes, n=2, max_new_tokens=5, concept_tokens=CONCEPT)
    for row in table[table["name"] != "last"].itertuples():
        full = torch.cat([IDS, torch.tensor(row.ids)])[None]
        with steer(model, changes.get(row.name, [])):
            steered = model(full)[0, 4:-1].log_softmax(-1)
        alone = model(full)[0, 4:-1].log_softmax(-1)
        chosen = torch.tensor(row.ids)[:, None]
        assert row.logprob_steered == pytest.approx(float(steered.gather(1, chosen).mean()), rel=1e-9)
        assert row.logprob_unsteered == pytest.approx(float(alone.gather(1, chosen).mean()), rel=1e-9)
        assert row.concept == pytest.approx(float(steered[:, CONCEPT].exp().sum(1).mean()), rel=1e-9)
    same = table[table["name"].isin(["unsteered", "none"])]
    assert same["logprob_steered"].tolist() == pytest.approx(same["logprob_unsteered"].tolist(), rel=1e-9)


def test_a_change_at_the_last_position_is_scored_step_by_step(tiny, changes):
    """In a run of the whole text only the very last position would be changed: that is not what tokens were drawn from."""
    model = tiny("gpt2", torch.float64)
    table = side_by_side(model, IDS, {"last": changes["last"]}, n=1, max_new_tokens=4, concept_tokens=CONCEPT)
    row = table[table["name"] == "last"].iloc[0]
    text, masses, logprobs = IDS, [], []
    for token in row["ids"]:
        with steer(model, changes["last"]):
            logp = model(text[None])[0, -1].log_softmax(-1)
        masses.append(float(logp[CONCEPT].exp().sum()))
        logprobs.append(float(logp[token]))
        text = torch.cat([text, torch.tensor([token])])
    assert row["concept"] == pytest.approx(sum(masses) / len(masses), rel=1e-9)
    assert row["logprob_steered"] == pytest.approx(sum(logprobs) / len(logprobs), rel=1e-9)


def test_a_value_for_each_continuation(tiny):
    model = tiny("gpt2", torch.float64)
    values = torch.tensor([-8.0, 0.0, 8.0], dtype=torch.float64)
    several = {"several": [Change(HOOK, direction(), "add", values)]}
    table = side_by_side(model, IDS, several, n=3, max_new_tokens=6, temperature=0.0)
    table = table.set_index(["name", "sample"])["ids"]
    assert table["several", 1] == table["unsteered", 1]
    for sample, value in enumerate(values.tolist()):
        one = {"one": [Change(HOOK, direction(), "add", value)]}
        alone = side_by_side(model, IDS, one, n=1, max_new_tokens=6, temperature=0.0).set_index("name")["ids"]
        assert table["several", sample] == alone["one"]


def test_text_in_text_out(mini_gpt2):
    prompt = "When Mary and John went to the store,"
    table = side_by_side(
        mini_gpt2, prompt, {"neuron": [neuron_vector(mini_gpt2, 1, 3).change(5.0)]}, n=2, max_new_tokens=6
    )
    assert len(table) == 4
    start = mini_gpt2.to_tokens(prompt)[0].tolist()
    for row in table.itertuples():
        whole = mini_gpt2.tokenizer.decode(start + row.ids, clean_up_tokenization_spaces=False)
        assert whole == mini_gpt2.tokenizer.decode(start, clean_up_tokenization_spaces=False) + row.text
    assert side_by_side(mini_gpt2, prompt, {}, n=1, max_new_tokens=2)["name"].tolist() == ["unsteered"]


def test_continuations_without_a_tokenizer():
    assert continuation(None, [1, 2], [3, 40]) == " 3 40"


def test_an_end_token_ends_a_row(tiny):
    model = tiny("gpt2")
    eos = model.tokenizer.eos_token_id
    towards = model.W_U[:, eos]
    table = side_by_side(
        model,
        IDS,
        {"end": [Change("blocks.2.hook_resid_post", towards, "add", 1e4)]},
        n=2,
        max_new_tokens=6,
        temperature=0.0,
    )
    ended = table[table["name"] == "end"]
    assert ended["ids"].tolist() == [[eos]] * 2
    assert table[["logprob_steered", "logprob_unsteered"]].notna().all(axis=None)


def test_refusals(tiny):
    model = tiny("gpt2")
    with refused(OptionError, "'unsteered' is the model left alone"):
        side_by_side(model, IDS, {"unsteered": []})
    with refused(OptionError, "nothing to write: 0 continuations of 50 tokens"):
        side_by_side(model, IDS, {}, n=0)
    with refused(OptionError, "no concept token"):
        side_by_side(model, IDS, {}, concept_tokens=[])
    with refused(OptionError, "tokens 0 to 63, not 64"):
        side_by_side(model, IDS, {}, concept_tokens=[3, 64])
    with refused(TaskError, "a prompt of 64 tokens leaves nothing to write"):
        side_by_side(model, torch.ones(64, dtype=torch.int64), {})
    with refused(OptionError, "top_p is a share"):
        side_by_side(model, IDS, {}, top_p=2.0)
