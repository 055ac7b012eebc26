"""Every metric against its formula, written with Python floats one prompt at a time."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interp.errors import MetricError
from interp.metrics import METRICS, Metric, get_metric
from interp.tasks.pairs import PromptPairs
from tests.small_pairs import refused

VOCABULARY = 7


@st.composite
def scored(draw) -> tuple[torch.Tensor, PromptPairs, torch.Tensor]:
    """(logits, pairs, clean logits): answer sets of several sizes, disjoint from the wrong answers."""
    n = draw(st.integers(1, 4))
    numbers = st.floats(-20, 20, allow_subnormal=False)
    table = st.lists(st.lists(numbers, min_size=VOCABULARY, max_size=VOCABULARY), min_size=n, max_size=n)
    answers, wrong = [], []
    for _ in range(n):
        order = draw(st.permutations(range(VOCABULARY)))
        cut = draw(st.integers(1, 3))
        answers.append(order[:cut])
        wrong.append(order[cut : cut + draw(st.integers(1, 3))])
    pairs = pairs_of(answers, wrong)
    return torch.tensor(draw(table), dtype=torch.float64), pairs, torch.tensor(draw(table), dtype=torch.float64)


def pairs_of(answers: list[list[int]], wrong: list[list[int]] | None) -> PromptPairs:
    def filled(rows: list[list[int]]) -> torch.Tensor:
        return torch.tensor([row + [-1] * (4 - len(row)) for row in rows])

    prompts = torch.zeros(len(answers), 3, dtype=torch.long)
    return PromptPairs(prompts, prompts, filled(answers), None if wrong is None else filled(wrong))


def sets(tokens: torch.Tensor) -> list[list[int]]:
    return [[t for t in row if t >= 0] for row in tokens.tolist()]


def softmax(row: list[float]) -> list[float]:
    top = max(row)
    total = math.fsum(math.exp(x - top) for x in row)
    return [math.exp(x - top) / total for x in row]


def mean(values) -> float:
    values = list(values)
    return math.fsum(values) / len(values)


def _kl(row, clean):
    return math.fsum(p * (math.log(p) - math.log(q)) for p, q in zip(softmax(clean), softmax(row), strict=True))


BY_HAND = {
    "logit_diff": lambda row, right, wrong, clean: mean(row[t] for t in right) - mean(row[t] for t in wrong),
    "answer_logit": lambda row, right, wrong, clean: mean(row[t] for t in right),
    "log_probability": lambda row, right, wrong, clean: math.log(math.fsum(softmax(row)[t] for t in right)),
    "probability": lambda row, right, wrong, clean: math.fsum(softmax(row)[t] for t in right),
    "probability_diff": lambda row, right, wrong, clean: (
        math.fsum(softmax(row)[t] for t in right) - math.fsum(softmax(row)[t] for t in wrong)
    ),
    "kl_divergence": lambda row, right, wrong, clean: _kl(row, clean),
    "accuracy": lambda row, right, wrong, clean: float(row.index(max(row)) in right),
}


def test_every_metric_has_a_formula_here():
    assert set(BY_HAND) == set(METRICS)
    for name, metric in METRICS.items():
        assert metric.name == name
        assert metric.unit
        assert metric.describe


@pytest.mark.parametrize("name", BY_HAND)
@given(case=scored())
@settings(max_examples=50, deadline=None)
def test_a_metric_is_its_formula(name, case):
    logits, pairs, clean = case
    values = METRICS[name](logits, pairs, clean)
    rows = zip(logits.tolist(), sets(pairs.answers), sets(pairs.wrong_answers), clean.tolist(), strict=True)
    expected = torch.tensor([BY_HAND[name](*row) for row in rows], dtype=torch.float64)
    assert values.shape == (len(pairs),)
    torch.testing.assert_close(values, expected, rtol=1e-9, atol=1e-9)


@given(case=scored())
@settings(deadline=None)
def test_kl_is_zero_on_the_clean_run_and_nowhere_negative(case):
    logits, pairs, clean = case
    kl = METRICS["kl_divergence"]
    assert torch.equal(kl(clean, pairs, clean), torch.zeros(len(pairs), dtype=torch.float64))
    assert (kl(logits, pairs, clean) >= -1e-12).all()


@given(case=scored(), shift=st.floats(-50, 50))
@settings(max_examples=30, deadline=None)
def test_only_the_logit_of_the_answer_notices_a_shift_of_all_logits(case, shift):
    logits, pairs, clean = case
    for name, metric in METRICS.items():
        expected = metric(logits, pairs, clean) + (shift if name == "answer_logit" else 0)
        if name != "accuracy":  # adding can round two logits onto each other
            torch.testing.assert_close(metric(logits + shift, pairs, clean), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", BY_HAND)
def test_a_prompt_is_scored_by_itself(name):
    torch.manual_seed(0)
    logits, clean = torch.randn(3, VOCABULARY), torch.randn(3, VOCABULARY)
    pairs = pairs_of([[1], [2, 3], [0, 4, 5]], [[2], [4], [1, 6]])
    alone = [METRICS[name](logits[i : i + 1], pairs.take([i]), clean[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(METRICS[name](logits, pairs, clean), torch.cat(alone))


@pytest.mark.parametrize("name", ["logit_diff", "answer_logit", "log_probability", "probability", "probability_diff"])
@pytest.mark.parametrize("value", [1e4, -torch.inf])
def test_the_fill_of_a_short_answer_set_reads_no_token(name, value):
    pairs = pairs_of([[1], [2, 3]], [[5], [6]])
    logits = torch.arange(14.0).reshape(2, 7) / 7
    logits[:, 0] = -torch.inf if value < 0 else 0.0
    before = METRICS[name](logits, pairs)
    if "prob" not in name:  # a probability may notice any token: it is normalised over all
        logits[:, 0] = value
    assert torch.equal(METRICS[name](logits, pairs), before)
    assert torch.isfinite(before).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_scored_in_float32(dtype):
    pairs, logits = pairs_of([[1]], [[2]]), torch.randn(1, VOCABULARY).to(dtype)
    value = METRICS["log_probability"](logits, pairs)
    assert value.dtype == torch.float32
    assert torch.equal(value, METRICS["log_probability"](logits.float(), pairs))
    assert METRICS["logit_diff"](logits.double(), pairs).dtype == torch.float64


# ---------------------------------------------------------------------------------------------------------- multipliers

DIFFERENTIABLE = [name for name in METRICS if name != "accuracy"]


def three_runs(
    size: float, dtype: torch.dtype, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, PromptPairs]:
    """Logits of two runs and of a clean one, with one to three answers per prompt."""
    generator = torch.Generator().manual_seed(seed)
    a, b, clean = size * torch.randn(3, 3, VOCABULARY, generator=generator, dtype=torch.float64).to(dtype)
    return a, b, clean, pairs_of([[1], [2, 3], [0, 4, 5]], [[2], [4], [1, 6]])


def assert_carries_the_difference(name: str, a, b, clean, pairs) -> None:
    """Sum of m (a - b) == metric(a) - metric(b), to what rounding the logits themselves leaves of it."""
    metric, (wide_a, wide_b, wide_clean) = METRICS[name], (x.double() for x in (a, b, clean))
    carried = (metric.multipliers(a, pairs, clean, b).double() * (wide_a - wide_b)).sum(1)
    here, there = (metric(x, pairs, wide_clean) for x in (wide_a, wide_b))
    largest, apart = torch.stack([wide_a, wide_b]).abs().max(), (wide_a - wide_b).abs().max()
    allowed = 20 * torch.finfo(a.dtype).eps * (1 + largest) * apart.clamp_max(1) + 1e-15 * (
        1 + here.abs() + there.abs()
    )
    assert torch.isfinite(carried).all()
    assert ((carried - (here - there)).abs() <= allowed).all()


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@given(case=scored(), other=scored())
@settings(max_examples=50, deadline=None)
def test_multipliers_between_two_runs_carry_the_metrics_difference(name, case, other):
    logits, pairs, clean = case
    assert_carries_the_difference(name, logits, other[0][:1].expand_as(logits), clean, pairs)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("size", [1e-6, 1.0, 10.0, 50.0])
def test_they_do_so_where_logits_differ_hardly_or_by_fifty(name, dtype, size):
    for seed in range(10):
        a, b, clean, pairs = three_runs(size, dtype, seed)
        assert_carries_the_difference(name, a, b, clean, pairs)


@pytest.mark.parametrize("name", ["probability", "probability_diff"])
@pytest.mark.parametrize("size", [1.0, 10.0, 50.0])
def test_a_probability_between_zero_and_one_has_multipliers_no_larger(name, size):
    for seed in range(10):
        a, b, clean, pairs = three_runs(size, torch.float64, seed)
        assert METRICS[name].multipliers(a, pairs, clean, b).abs().max() <= 1


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize(("level_a", "level_b"), [(-100.0, -100.0), (100.0, 100.0), (-100.0, 0.0)])
def test_the_level_of_the_logits_does_not_matter(name, level_a, level_b):
    a, b, clean, pairs = three_runs(3.0, torch.float32)
    assert_carries_the_difference(name, a + level_a, b + level_b, clean, pairs)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("step", [0.0, 1e-8])
def test_multipliers_between_runs_that_hardly_differ_are_the_gradient(name, step):
    a, b, clean, pairs = three_runs(2.0, torch.float64)
    gradient = METRICS[name].multipliers(a, pairs, clean)
    by_hand = a.clone().requires_grad_()
    (expected,) = torch.autograd.grad(METRICS[name](by_hand, pairs, clean).sum(), by_hand)
    assert torch.equal(gradient, expected)
    torch.testing.assert_close(METRICS[name].multipliers(a, pairs, clean, a + step * b), gradient, rtol=1e-6, atol=1e-7)
    assert not METRICS[name].multipliers(a, pairs, clean).requires_grad


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_multipliers_do_not_know_which_run_came_first(name):
    a, b, clean, pairs = three_runs(4.0, torch.float64)
    there = METRICS[name].multipliers(b, pairs, clean, a)
    torch.testing.assert_close(METRICS[name].multipliers(a, pairs, clean, b), there, rtol=1e-11, atol=1e-13)


def test_multipliers_of_a_linear_metric_are_its_weights():
    a, b, clean, pairs = three_runs(4.0, torch.float64)
    for name in ("logit_diff", "answer_logit"):
        weights = METRICS[name].weights(pairs, VOCABULARY)
        for found in (METRICS[name].multipliers(a, pairs), METRICS[name].multipliers(a, pairs, clean, b)):
            torch.testing.assert_close(found, weights)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_multipliers_of_half_precision_logits_are_formed_in_float32(name, dtype):
    a, b, clean, pairs = three_runs(2.0, dtype)
    for other in (None, b):
        found = METRICS[name].multipliers(a, pairs, clean, other)
        wide = METRICS[name].multipliers(a.float(), pairs, clean.float(), None if other is None else other.float())
        assert found.dtype == torch.float32
        assert torch.equal(found, wide)


def test_what_has_no_multipliers_says_so():
    a, b, clean, pairs = three_runs(2.0, torch.float32)
    with pytest.raises(MetricError, match="accuracy has no gradient; use logit_diff or patch exactly"):
        METRICS["accuracy"].multipliers(a, pairs)
    mine = get_metric(lambda logits: logits[:, 0].square())
    assert torch.equal(mine.multipliers(a, pairs)[:, 0], 2 * a[:, 0])
    for metric, name in ((mine, "<lambda>"), (METRICS["accuracy"], "accuracy")):
        with pytest.raises(
            MetricError, match=f"{name} has no secant between two runs; use logit_diff, or patch exactly"
        ):
            metric.multipliers(a, pairs, None, b)
    kl = METRICS["kl_divergence"]
    with pytest.raises(MetricError, match="gradient of kl_divergence is zero in the clean run"):
        kl.multipliers(clean, pairs, clean)
    assert (kl.multipliers(clean, pairs, clean, a) != 0).all()


# ---------------------------------------------------------------------------------------------------------- callables


def test_a_callable_of_the_logits_is_a_metric():
    pairs, logits = pairs_of([[1], [2]], None), torch.randn(2, VOCABULARY)

    def largest(logits):
        """The largest logit."""
        return logits.max(-1).values

    metric = get_metric(largest)
    assert torch.equal(metric(logits, pairs), logits.max(-1).values)
    assert metric.name == "largest"
    assert metric.describe == "The largest logit."


def test_a_callable_of_logits_and_pairs_is_a_metric():
    pairs, logits = pairs_of([[1], [2]], None), torch.randn(2, VOCABULARY)
    metric = get_metric(lambda logits, pairs: logits.gather(1, pairs.answers[:, :1])[:, 0])
    assert torch.equal(metric(logits, pairs), logits[[0, 1], [1, 2]])


def test_an_object_that_can_be_called_is_a_metric():
    class Spread:
        def __call__(self, logits):
            return logits.std(-1)

    metric = get_metric(Spread())
    assert metric.name == "Spread"
    assert metric(torch.randn(2, VOCABULARY), pairs_of([[1], [2]], None)).shape == (2,)


def test_a_metric_stays_itself():
    metric = METRICS["probability"]
    assert get_metric(metric) is metric is get_metric("probability")
    assert isinstance(metric, Metric)


# ------------------------------------------------------------------------------------------------------------- errors


def test_an_unknown_metric_is_named_with_its_neighbour():
    with pytest.raises(MetricError, match=r"'logit_dif' is not a metric .*did you mean 'logit_diff'"):
        get_metric("logit_dif")
    with refused(MetricError, "3 is neither the name of a metric nor a callable"):
        get_metric(3)


@pytest.mark.parametrize("name", ["logit_diff", "probability_diff"])
def test_wrong_answers_are_asked_for_where_needed(name):
    with pytest.raises(MetricError, match=f"metric {name} needs wrong answers"):
        METRICS[name](torch.zeros(1, VOCABULARY), pairs_of([[1]], None))


def test_clean_logits_are_asked_for_where_needed():
    with pytest.raises(MetricError, match="kl_divergence needs"):
        METRICS["kl_divergence"](torch.zeros(1, VOCABULARY), pairs_of([[1]], None))


@pytest.mark.parametrize(("name", "bad"), [(n, b) for n in BY_HAND for b in (torch.nan, torch.inf) if n != "accuracy"])
def test_a_value_that_is_not_finite_names_its_prompts(name, bad):
    pairs = pairs_of([[1]] * 9, [[2]] * 9)
    logits = torch.zeros(9, VOCABULARY)
    logits[[1, 8]] = bad
    with pytest.raises(MetricError, match=f"metric {name} is not finite on prompts 1, 8"):
        METRICS[name](logits, pairs, torch.zeros(9, VOCABULARY))


def test_logits_that_are_no_numbers_have_no_accuracy():
    with pytest.raises(MetricError, match="accuracy is not finite on prompts 1"):
        METRICS["accuracy"](torch.tensor([[0.0, 1.0, 2.0], [0.0, torch.nan, 2.0]]), pairs_of([[1], [1]], None))


def test_of_many_prompts_some_are_named():
    pairs = pairs_of([[1]] * 9, [[2]] * 9)
    with pytest.raises(MetricError, match="on prompts 0, 1, 2, 3, 4 and 4 more"):
        METRICS["logit_diff"](torch.full((9, VOCABULARY), torch.nan), pairs)


@pytest.mark.parametrize("function", [lambda x: x.mean(), lambda x: x, lambda x: x[:1, 0]])
def test_a_callable_that_does_not_give_one_value_per_prompt_is_refused(function):
    with pytest.raises(MetricError, match="not one value per prompt"):
        get_metric(function)(torch.zeros(2, VOCABULARY), pairs_of([[1], [2]], None))
