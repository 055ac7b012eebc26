"""A neuron that knows the answer is planted and found; random labels give chance; ties favour nobody."""

import numpy as np
import pytest
import torch

from interp.diagnostics.truth_vote import _credit, truth_vote, truth_vote_plot
from interp.errors import OptionError, TaskError, UnsupportedModel
from interp.model.run import record
from tests.small_pairs import refused

TRUE = " w7"
N = 40


def questions(n: int = N, *, seed: int = 0, first: bool = False):
    """(questions, candidates, correct): answers of one word, of which " w7" is true; two to four of them."""
    rng = np.random.default_rng(seed)
    asked = [f" w{rng.integers(8, 27)} w{rng.integers(8, 27)}" for _ in range(n)]
    candidates, correct = [], []
    for _ in range(n):
        wrong = [f" w{i}" for i in rng.permutation(np.arange(8, 27))[: rng.integers(1, 4)]]
        at = 0 if first else int(rng.integers(len(wrong) + 1))
        candidates.append([*wrong[:at], TRUE, *wrong[at:]])
        correct.append(at)
    return asked, candidates, correct


def knowing(model, value: float, *, alone: bool = False):
    """Hooks under which neuron 5 of layer 1 has this activation on the true word, less elsewhere; others may be silent."""
    seen = {}
    true = model.W_E[model.to_single_token(TRUE)]

    def look(embedded, hook):
        seen["true"] = (embedded == true).all(-1)

    def write(post, hook):
        known = torch.where(seen["true"], value, post[..., 5].clamp(-1, 1))
        post = torch.zeros_like(post) if alone else post.clone()
        post[..., 5] = known
        return post

    hooks = [("hook_embed", look), ("blocks.1.mlp.hook_post", write)]
    if alone:
        hooks += [(f"blocks.{at}.mlp.hook_post", lambda post, hook: torch.zeros_like(post)) for at in (0, 2)]
    return model.hooks(fwd_hooks=hooks)


@pytest.mark.parametrize(("value", "pole"), [(50.0, "max"), (-50.0, "min")])
@pytest.mark.parametrize("vote", ["majority", "weighted"])
def test_a_neuron_that_knows_is_found(tiny, value, pole, vote):
    model = tiny("gpt2", torch.float64)
    with knowing(model, value, alone=True):
        found = truth_vote(model, *questions(), n_keep=1, vote=vote)
    assert found.kept.to_dict("records") == [{"layer": 1, "neuron": 5, "pole": pole, "score": 1, "test": 1}]
    assert found.accuracy == 1
    with knowing(model, value):
        kept = truth_vote(model, *questions(), n_keep=400, vote=vote).kept
    mine = kept[(kept["layer"] == 1) & (kept["neuron"] == 5) & (kept["pole"] == pole)]
    assert mine[["score", "test"]].to_numpy().tolist() == [[1, 1]]


def test_every_number_is_that_of_a_loop(tiny):
    model = tiny("llama", torch.float64)
    asked, candidates, correct = questions(12, seed=3)
    asked = [f"{question} w3" * (1 + i % 2) for i, question in enumerate(asked)]
    found = truth_vote(model, asked, candidates, correct, support=0.5, n_keep=3, n_null=2, seed=1, batch_size=7)
    order = np.random.default_rng(1).permutation(12)
    support, test = order[:6], order[6:]
    hooks = [f"blocks.{layer}.mlp.hook_post" for layer in range(model.cfg.n_layers)]
    picks, likely = {}, {}
    for q in range(12):
        rows, sums = [], []
        for answer in candidates[q]:
            tokens = model.to_tokens(asked[q] + answer)
            rows.append(np.concatenate([value[0, -1].numpy() for value in record(model, tokens, hooks).values()]))
            sums.append(float(model(tokens)[0, -2].log_softmax(-1)[tokens[0, -1]]))
        table = np.stack(rows)
        picks[q] = np.concatenate([table.argmax(0), table.argmin(0)])
        likely[q] = int(np.argmax(sums))
    scores = np.mean([picks[q] == correct[q] for q in support], 0)
    kept = np.argsort(-scores, kind="stable")[:3]
    assert found.kept["score"].tolist() == pytest.approx(scores[kept].tolist())
    n = len(scores) // 2
    assert found.kept["layer"].tolist() == (kept % n // model.cfg.d_mlp).tolist()
    assert found.kept["neuron"].tolist() == (kept % n % model.cfg.d_mlp).tolist()
    assert found.kept["pole"].tolist() == ["max" if i < n else "min" for i in kept]
    right = []
    for q in test:
        votes = [sum(picks[q][i] == c for i in kept) for c in range(len(candidates[q]))]
        best = [c for c, count in enumerate(votes) if count == max(votes)]
        right.append((correct[q] in best) / len(best))
    assert found.accuracy == pytest.approx(np.mean(right))
    assert found.likelihood == pytest.approx(np.mean([likely[q] == correct[q] for q in test]))
    assert found.likelihood_per_token == found.likelihood  # answers of one word
    assert found.chance == pytest.approx(np.mean([1 / len(candidates[q]) for q in test]))
    assert (found.n_support, found.n_test) == (6, 6)


def test_answers_of_several_tokens(tiny):
    """Sum against mean: a long answer loses by the sum."""
    model = tiny("gpt2", torch.float64)
    asked, candidates = [" w1 w2", " w3"] * 3, [[" w4", " w5 w6 w7"]] * 6
    found = truth_vote(model, asked, candidates, [0] * 6, n_keep=1, n_null=1)
    test = np.random.default_rng(0).permutation(6)[3:]
    by_sum, by_mean = [], []
    for q in test:
        scores = []
        for answer in candidates[q]:
            tokens = model.to_tokens(asked[q] + answer)
            start = model.to_tokens(asked[q]).shape[1]
            log_p = model(tokens)[0].log_softmax(-1)
            scores.append([float(log_p[t - 1, tokens[0, t]]) for t in range(start, tokens.shape[1])])
        by_sum.append(sum(scores[0]) > sum(scores[1]))
        by_mean.append(np.mean(scores[0]) > np.mean(scores[1]))
    assert found.likelihood == pytest.approx(np.mean(by_sum))
    assert found.likelihood_per_token == pytest.approx(np.mean(by_mean))


@pytest.mark.parametrize("vote", ["majority", "weighted"])
def test_neurons_that_say_nothing_give_chance(tiny, vote):
    """All candidates tie everywhere; the true one always stands first, and gains nothing by it."""
    model = tiny("gpt2")
    silent = [(f"blocks.{layer}.mlp.hook_post", lambda value, hook: torch.zeros_like(value)) for layer in range(3)]
    with model.hooks(fwd_hooks=silent):
        found = truth_vote(model, *questions(first=True), vote=vote)
    assert not found.kept["score"].any()
    assert found.accuracy == pytest.approx(found.chance)
    assert found.null_mean == pytest.approx(found.chance)
    assert found.p_value == 1


def test_random_labels_give_chance(tiny):
    model = tiny("gpt2")
    with knowing(model, 50.0):
        found = truth_vote(model, *questions(80, first=True), n_keep=16, n_null=200)
    low, high = found.null_interval
    assert found.accuracy == 1
    assert low < found.null_mean < high < 1
    # 40 test questions at about .4: a draw has a standard deviation of .08
    assert found.null_mean == pytest.approx(found.chance, abs=0.03)
    assert found.p_value == pytest.approx(1 / 201)


def test_the_best_of_many_fit_the_support_by_luck(tiny):
    """Without a true answer: full marks on support that mean nothing on the rest."""
    rng = np.random.default_rng(5)
    asked, candidates, _ = questions(60, seed=8)
    candidates = [[f" w{i}" for i in rng.permutation(27)[:2]] for _ in asked]
    found = truth_vote(tiny("gpt2"), asked, candidates, rng.integers(2, size=60).tolist(), support=0.1, n_keep=4)
    assert found.kept["score"].max() == 1
    assert found.kept["score"].mean() > found.kept["test"].mean() + 0.2


def test_credit_is_shared_among_equals():
    scores = torch.tensor([[1.0, 1.0, -torch.inf], [0.0, 2.0, 1.0], [0.5, 0.5, 0.5]], dtype=torch.float64)
    labels, sizes = torch.tensor([0, 1, 2]), torch.tensor([2, 3, 3])
    assert _credit(scores, labels, sizes) == pytest.approx((1 / 2 + 1 + 1 / 3) / 3)


def test_the_batch_and_the_seed(tiny):
    model = tiny("llama", torch.float64)
    a, b = (truth_vote(model, *questions(20), n_keep=5, batch_size=n, seed=2) for n in (1, 64))
    assert a.kept.equals(b.kept)
    assert (a.accuracy, a.likelihood, a.null.tolist()) == (b.accuracy, b.likelihood, b.null.tolist())


def test_picture(tiny):
    found = truth_vote(tiny("gpt2"), *questions(20), n_keep=5)
    figure = truth_vote_plot(found, title="vote")
    assert list(figure.data[0].x) == found.null.tolist()
    assert [line.x0 for line in figure.layout.shapes] == [
        found.accuracy, found.likelihood, found.likelihood_per_token, found.chance,
    ]  # fmt: skip


def test_refusals(tiny):
    model, (asked, candidates, correct) = tiny("gpt2"), questions(6)
    with refused(TaskError, "5 questions, 6 lists of candidates and 6 true answers"):
        truth_vote(model, asked[:5], candidates, correct)
    with refused(TaskError, "question 0 has 1 candidates"):
        truth_vote(model, asked, [[TRUE], *candidates[1:]], correct)
    with refused(TaskError, "the true answer of question 5 is candidate 9 of"):
        truth_vote(model, asked, candidates, [*correct[:5], 9])
    with refused(TaskError, "candidate 1 of question 0 adds no token"):
        truth_vote(model, asked, [[TRUE, ""], *candidates[1:]], [0, *correct[1:]])
    with refused(OptionError, "'mean' is not a way to vote"):
        truth_vote(model, asked, candidates, correct, vote="mean")
    with refused(OptionError, "a support share of 1.0 of 6 questions"):
        truth_vote(model, asked, candidates, correct, support=1.0)
    with refused(OptionError, "cannot keep 0 of 480"):
        truth_vote(model, asked, candidates, correct, n_keep=0)
    with refused(UnsupportedModel, "load the model with load_model"):
        truth_vote(torch.nn.Linear(2, 2), asked, candidates, correct)
