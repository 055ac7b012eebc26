"""What a sweep says it will do is what it does: rows, FLOPs, chunks, memory, and which logits it reads."""

import copy
import dataclasses
import random
import re
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from interp import PromptPairs, Transformer, activation_patching
from interp.errors import MetricError, OptionError
from interp.exact import exact_scores
from interp.interventions import Patch
from interp.metrics import get_metric
from interp.sites import SITES
from interp.sweep import SweepPlan, SweepRuns, in_halves, row_bytes
from interp.tasks.corrupt import corrupt
from interp.walk import Walk
from tests.small_pairs import refused

WIDTH = 9
DIFFERS = ((0, 2), (0, 5), (1, 5), (2, 4), (2, 6), (2, 8))  # (prompt, position); the last one is padding
LENGTHS = (9, 9, 8)
FIRST = (2, 5, 4)
N_ROWS = 2 * (7 + 4 + 4) + 5  # of `resid_pre(3)`: in layer 0 only where the tokens differ, then from there on


def prompts() -> PromptPairs:
    generator = torch.Generator().manual_seed(0)
    clean = torch.randint(4, 60, (3, WIDTH), generator=generator)
    changed = clean.clone()
    for row, position in DIFFERS:
        changed[row, position] = (clean[row, position] + 7) % 56 + 4
    answers = torch.tensor([[5, 9, 11], [6, -1, -1], [7, 40, -1]])
    wrong = torch.tensor([[30, -1], [31, 32], [5, 33]])
    return PromptPairs(clean, changed, answers, wrong, lengths=torch.tensor(LENGTHS))


def resid_pre(n_layers: int) -> list:
    return [(Patch("resid_pre", layer, position=p),) for layer in range(n_layers) for p in range(WIDTH)]


def some_interventions(cfg, n: int, seed: int) -> list:
    """Single and joint patches of any site, somewhere."""
    rng = random.Random(seed)
    sites = [name for name in SITES if not (name == "resid_mid" and cfg.parallel)]

    def patch() -> Patch:
        site, position = rng.choice(sites), rng.choice([None, *range(-3, WIDTH - 1)])
        n_units = SITES[site].n_units(cfg)
        return Patch(site, rng.randrange(cfg.n_layers), None if n_units is None else rng.randrange(n_units), position)

    return [tuple(patch() for _ in range(rng.choice([1, 1, 1, 2, 4]))) for _ in range(n)]


def plan_of(model, interventions, **options) -> SweepPlan:
    return SweepPlan.of(model, [prompts()], interventions, **options)


@pytest.fixture
def walks(monkeypatch) -> list[Walk]:
    """Every walk that is finished while the test runs."""
    done, final_resid = [], Walk.final_resid

    def spy(self):
        result = final_resid(self)
        done.append(self)
        return result

    monkeypatch.setattr(Walk, "final_resid", spy)
    return done


@pytest.fixture
def columns(monkeypatch) -> list:
    """The columns of every unembedding while the test runs; None is the whole vocabulary."""
    asked, unembed_resid = [], Transformer.unembed_resid

    def spy(self, *args, columns=None, **options):
        asked.append(None if columns is None else columns.tolist())
        return unembed_resid(self, *args, columns=columns, **options)

    monkeypatch.setattr(Transformer, "unembed_resid", spy)
    return asked


# ------------------------------------------------------------------------------------------------------------------ rows


@pytest.mark.parametrize("family", ["gpt2", "pythia", "gemma2"])
def test_rows_of_a_residual_sweep_are_the_positions_from_the_first_difference_on(tiny, walks, family):
    model, pairs, plans = tiny(family), prompts(), []
    activation_patching(model, pairs, "resid_pre", announce=plans.append)
    n_changed = sum(length - first for length, first in zip(LENGTHS, FIRST, strict=True))
    assert plans[0].rows == (model.cfg.n_layers - 1) * n_changed + 5  # before any attention only where tokens differ
    assert sum(len(walk.plan) for walk in walks) == plans[0].rows
    assert (plans[0].cells, plans[0].prompts, plans[0].chunks) == (model.cfg.n_layers * WIDTH, 3, len(walks))


@settings(max_examples=20, deadline=None)
@given(
    family=st.sampled_from(["gpt2", "gptj"]), n=st.integers(1, 20), seed=st.integers(0, 10**6),
    batch_size=st.sampled_from([None, 1, 2]), max_memory=st.sampled_from([None, 1, 100_000]),
)  # fmt: skip
def test_the_rows_and_chunks_planned_are_those_that_run(tiny, family, n, seed, batch_size, max_memory):
    model, batches = tiny(family), prompts().chunks(batch_size)
    interventions = some_interventions(model.cfg, n, seed)
    plan = SweepPlan.of(model, batches, interventions, max_memory=max_memory)
    sites = sorted({patch.site for intervention in interventions for patch in intervention})
    found, n_chunks = Counter(), 0
    for i, pairs in enumerate(batches):
        runs = SweepRuns(model, pairs, base="clean", sites=sites, max_memory=max_memory)
        for _, cells, rows, resid in runs.run(interventions, lambda resid, _: resid):
            assert len(cells) == len(rows) == len(resid)
            found.update((i, cell, row) for cell, row in zip(cells.tolist(), rows.tolist(), strict=True))
            n_chunks += 1
    assert set(found.values()) <= {1}  # every row once
    assert plan.rows == len(found)
    assert plan.cells == n
    assert plan.prompts == 3
    assert n_chunks <= plan.chunks  # a chunk in which nothing can change is not run


def test_what_cannot_change_the_metric_has_no_row(tiny):
    """A row is there if a patch touches a position from the first difference to the end, before it is too late."""
    model = tiny("gpt2")
    last = model.cfg.n_layers - 1
    count = lambda *patches: plan_of(model, [patches]).rows  # noqa: E731
    assert count(Patch("mlp_out", 0, position=1)) == 0
    assert [count(Patch("mlp_out", 0, position=p)) for p in range(WIDTH)] == [0, 0, 1, 1, 2, 3, 3, 3, 2]
    assert count(Patch("mlp_out", 0)) == 3
    # in the last layer, only keys, values and the stream before them matter at other positions than the one read
    for site in ("resid_pre", "k", "v"):
        assert count(Patch(site, last, position=6)) == 3, site
    for site in ("q", "pattern", "head", "attn_out", "resid_mid", "neuron", "mlp_out", "resid_post"):
        assert count(Patch(site, last, position=6)) == 0, site
        assert count(Patch(site, last, position=-1)) == count(Patch(site, last)) == 3, site
        assert count(Patch(site, last, position=8)) == 2, site
    assert count(Patch("mlp_out", 0, position=1), Patch("head", last, 2, position=8)) == 2
    assert count() == 0


def test_zeros_change_every_position(tiny):
    """Values that are not the other run's can differ before the prompts do."""
    model = tiny("gpt2")
    assert plan_of(model, resid_pre(3)).rows == N_ROWS
    assert plan_of(model, resid_pre(3), source="zero").rows == 3 * sum(LENGTHS)


def test_noise_changes_what_it_is_added_to(tiny):
    model = tiny("gpt2")
    noisy = corrupt(model, prompts(), "gaussian", tokens=torch.arange(WIDTH).expand(3, -1) == 6)
    assert SweepPlan.of(model, [noisy], resid_pre(3)).rows == 2 * (3 + 3 + 2) + 3


# ----------------------------------------------------------------------------------------------------------------- FLOPs


def per_token(cfg) -> tuple[int, int, int]:
    """FLOPs of a token in a layer, counted from the weights' shapes: queries, keys and values, everything."""
    q, kv = 2 * cfg.d_model * cfg.n_heads * cfg.d_head, 4 * cfg.d_model * cfg.n_kv_heads * cfg.d_head
    return q, kv, 2 * q + kv + 2 * cfg.d_model * cfg.d_mlp * (3 if cfg.gated else 2)


@pytest.mark.parametrize("family", ["gpt2", "llama3", "gemma2", "pythia", "starcoder2"])
def test_flops_of_a_residual_sweep_are_the_closed_form(tiny, family):
    """Row (l, p) of a prompt with n = end - p tokens. Layer l changes at p alone: one query, key and value; from its
    attention on all n tokens differ. The last layer needs n keys and values, and the rest at the position read:

        l < L-1:  (q + kv) + n (c - q - kv)  +  (L-2-l) n c  +  n kv + (c - kv)
        l = L-1:  c

    Summed over p and l, with S the sum of the n and N their number: c S L(L-1)/2 + L (kv S + (c - kv) N), less what a
    change at one position saves, (S - N) ((L-1)(q + kv) + kv). And in layer 0, a position where the tokens are the same
    has no row.
    """
    cfg = tiny(family).cfg
    q, kv, c = per_token(cfg)
    n_layers, suffixes = (
        cfg.n_layers,
        [range(1, length - first + 1) for length, first in zip(LENGTHS, FIRST, strict=True)],
    )
    rows = 0
    for n in (n for suffix in suffixes for n in suffix):
        for layer in range(n_layers - 1):
            rows += (q + kv) + n * (c - q - kv) + (n_layers - 2 - layer) * n * c + n * kv + (c - kv)
        rows += c
    S, N = sum(map(sum, suffixes)), sum(map(len, suffixes))
    whole_suffixes = c * S * n_layers * (n_layers - 1) // 2 + n_layers * (kv * S + (c - kv) * N)
    assert rows == whole_suffixes - (S - N) * ((n_layers - 1) * (q + kv) + kv)

    for row, (first, length) in enumerate(zip(FIRST, LENGTHS, strict=True)):
        for n in (length - p for p in range(first, length) if (row, p) not in DIFFERS):
            rows -= (q + kv) + n * (c - q - kv) + (n_layers - 2) * n * c + n * kv + (c - kv)
    plan, one_pass = plan_of(tiny(family), resid_pre(n_layers)), 3 * WIDTH * n_layers * c
    assert plan.flops == rows + 2 * one_pass
    assert plan.naive_flops == (2 + n_layers * WIDTH) * one_pass


@pytest.mark.parametrize("family", ["gpt2", "llama3", "pythia", "gptj", "olmo2"])
def test_the_flops_planned_are_those_of_the_matrix_products_that_run(tiny, family):
    """Counted by torch while the sweep runs; what attention itself multiplies is left out, as the plan says."""
    model, plans = tiny(family), []
    interventions = some_interventions(model.cfg, 30, 1) + resid_pre(model.cfg.n_layers)
    for options in ({}, {"max_memory": 100_000}, {"batch_size": 2}):
        plans.clear()
        with FlopCounterMode(display=False) as counter:
            exact_scores(
                model, prompts(), interventions, metrics=[get_metric("accuracy")], base="corrupt",
                announce=plans.append, **options,
            )  # fmt: skip
        counts = counter.get_flop_counts()["Global"]
        matrices = sum(n for op, n in counts.items() if op in (torch.ops.aten.mm, torch.ops.aten.addmm))
        unembedding = 2 * model.cfg.d_model * model.cfg.d_vocab * (plans[0].rows + 2 * 3)
        assert matrices == plans[0].flops + unembedding
        assert plans[0].naive_flops > plans[0].flops


def test_batches_add_up(tiny):
    model, pairs = tiny("gpt2"), prompts()
    interventions = some_interventions(model.cfg, 20, 3)
    whole = SweepPlan.of(model, [pairs], interventions)
    parts = [SweepPlan.of(model, [batch], interventions) for batch in pairs.chunks(1)]
    together = SweepPlan.of(model, pairs.chunks(1), interventions)
    assert together.rows == whole.rows == sum(part.rows for part in parts)
    assert together.flops == whole.flops == sum(part.flops for part in parts)
    assert together.naive_flops == whole.naive_flops
    assert (together.cells, together.prompts) == (whole.cells, whole.prompts) == (20, 3)
    assert together.chunks == sum(part.chunks for part in parts)
    assert together.peak_bytes == max(part.peak_bytes for part in parts) < whole.peak_bytes


# ------------------------------------------------------------------------------------------------------ chunks and memory


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 40), limits=st.tuples(st.integers(1, 10**6), st.integers(1, 10**6)))
def test_less_memory_means_more_chunks_each_within_it(tiny, seed, n, limits):
    model = tiny("gpt2")
    interventions = some_interventions(model.cfg, n, seed)
    small, large = (plan_of(model, interventions, max_memory=limit) for limit in sorted(limits))
    alone = max(plan_of(model, [one]).peak_bytes for one in interventions)
    assert 1 <= large.chunks <= small.chunks <= n
    assert small.peak_bytes <= large.peak_bytes
    for plan, limit in ((small, min(limits)), (large, max(limits))):
        assert plan.peak_bytes <= max(limit, alone)
    assert small.rows == large.rows
    assert small.flops == large.flops


def test_one_intervention_too_large_by_itself_is_a_chunk_of_its_own(tiny, walks):
    model, plans = tiny("gpt2"), []
    activation_patching(model, prompts(), "mlp_out", positions="all", max_memory=1, announce=plans.append)
    assert plans[0].chunks == plans[0].cells == model.cfg.n_layers == len(walks)
    assert {len(np.unique(walk.plan.cell)) for walk in walks} == {1}


@pytest.mark.parametrize("max_memory", [30_000, 100_000, 10**7])
def test_the_peak_is_that_of_the_largest_chunk(tiny, walks, max_memory):
    model, plans = tiny("gpt2"), []
    activation_patching(model, prompts(), ["resid_pre", "head"], max_memory=max_memory, announce=plans.append)
    used = [int(row_bytes(model, walk.plan).sum()) for walk in walks]
    assert plans[0].peak_bytes == max(used)
    assert all(n <= max_memory or len(np.unique(w.plan.cell)) == 1 for n, w in zip(used, walks, strict=True))


def test_without_a_limit_everything_that_fits_is_one_chunk(tiny):
    assert plan_of(tiny("gpt2"), resid_pre(3)).chunks == 1


@pytest.mark.parametrize("max_memory", [0, -1])
def test_no_memory_at_all_is_refused(tiny, max_memory):
    with refused(OptionError, f"max_memory is a number of bytes, at least 1, not {max_memory}"):
        plan_of(tiny("gpt2"), resid_pre(3), max_memory=max_memory)
    with refused(OptionError, f"max_memory is a number of bytes, at least 1, not {max_memory}"):
        activation_patching(tiny("gpt2"), prompts(), "head", max_memory=max_memory)


def test_a_plan_is_one_line():
    plan = SweepPlan(
        cells=1_234, prompts=5_678, rows=7_006_652, chunks=3, flops=2.5e12, naive_flops=8e13, peak_bytes=3 * 2**30
    )
    assert str(plan) == (
        "1,234 cells x 5,678 prompts: 7,006,652 rows in 3 chunks, 2.5e+03 GFLOP (32x less than a forward pass each), "
        "about 3,072 MiB"
    )


def test_one_chunk_is_not_chunks(tiny):
    plan = plan_of(tiny("gpt2"), resid_pre(3))
    assert re.fullmatch(
        r"27 cells x 3 prompts: 35 rows in 1 chunk, [\d.e-]+ GFLOP \([\d.]+x less than a forward pass each\), about \d+ MiB",
        str(plan),
    )


# -------------------------------------------------------------------------------------------------------------- announced


@pytest.mark.parametrize("options", [{}, {"batch_size": 1}, {"max_memory": 1}], ids=str)
def test_a_sweep_announces_its_plan_once_and_before_it_computes_anything(tiny, monkeypatch, walks, options):
    model, events, forward = tiny("gpt2"), [], Transformer.forward

    def spy(self, *args, **kwargs):
        events.append("forward")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(Transformer, "forward", spy)

    def announce(plan):
        assert not walks
        events.append(plan)

    activation_patching(model, prompts(), ["resid_pre", "head"], announce=announce, **options)
    assert isinstance(events[0], SweepPlan)
    assert events[1:] == ["forward"] * (3 if "batch_size" in options else 1)
    assert walks


def test_means_are_taken_after_the_announcement(tiny, monkeypatch):
    """Also when the source of values costs runs of its own."""
    model, events, forward = tiny("gpt2"), [], Transformer.forward

    def spy(self, *args, **kwargs):
        events.append("forward")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(Transformer, "forward", spy)
    exact_scores(
        model, prompts(), resid_pre(3), metrics=[get_metric("logit_diff")], base="clean", source="mean",
        announce=events.append,
    )  # fmt: skip
    assert isinstance(events[0], SweepPlan)
    assert events[1:] == ["forward"] * 2  # the means', and the sweep's
    assert events[0].rows == 3 * sum(LENGTHS)


def test_hooks_have_no_plan(tiny):
    plans = []
    activation_patching(tiny("gpt2"), prompts(), "mlp_out", positions="all", engine="hooks", announce=plans.append)
    assert plans == []


# ------------------------------------------------------------------------------------------------------- running out of it


def out_of_memory_beyond(monkeypatch, n_rows: int) -> tuple[list, list]:
    """Walks of more than n_rows rows fail as on a full accelerator: the plans that were tried, and those that were done."""
    tried, done, final_resid = [], [], Walk.final_resid

    def limited(self):
        tried.append(self.plan)
        if len(self.plan) > n_rows:
            raise torch.OutOfMemoryError(f"{len(self.plan)} rows do not fit")
        done.append(self.plan)
        return final_resid(self)

    monkeypatch.setattr(Walk, "final_resid", limited)
    return tried, done


@pytest.mark.parametrize("n_rows", [3, 7, 20, 1000])
def test_a_sweep_that_runs_out_of_memory_goes_on_in_halves(tiny, monkeypatch, n_rows):
    model, pairs = tiny("gpt2", torch.float64), prompts()
    interventions = some_interventions(model.cfg, 12, 5) + resid_pre(3)
    metrics = [get_metric("logit_diff"), get_metric("kl_divergence")]
    whole = exact_scores(model, pairs, interventions, metrics=metrics, base="corrupt").patched
    tried, done = out_of_memory_beyond(monkeypatch, n_rows)
    plans: list[SweepPlan] = []
    found = exact_scores(model, pairs, interventions, metrics=metrics, base="corrupt", announce=plans.append).patched
    torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-12)
    assert sum(map(len, done)) == plans[0].rows  # every row once
    assert max(map(len, done)) <= n_rows
    assert (len(tried) > len(done)) == (plans[0].rows > n_rows)


def test_every_intervention_is_handed_out_once_and_in_order(tiny, monkeypatch):
    model, pairs = tiny("gpt2", torch.float64), prompts()
    _, done = out_of_memory_beyond(monkeypatch, 10)
    interventions = resid_pre(3)
    runs, handed = SweepRuns(model, pairs, base="clean", sites=["resid_pre"]), Counter()
    reached = 0
    for upto, cells, rows, _ in runs.run(interventions, lambda resid, _: resid):
        handed.update(zip(cells.tolist(), rows.tolist(), strict=True))
        assert reached <= cells.min() <= cells.max() < upto  # nothing before what is done, nothing after it
        reached = upto
    assert set(handed.values()) == {1}
    assert len(handed) == N_ROWS == sum(map(len, done))


def test_running_out_while_reading_is_mended_too(tiny):
    model, pairs = tiny("gpt2", torch.float64), prompts()
    sizes = []

    def read(resid, rows):
        sizes.append(len(resid))
        if len(resid) > 10:
            raise torch.OutOfMemoryError("logits do not fit")
        return resid

    runs = SweepRuns(model, pairs, base="clean", sites=["resid_pre"])
    handed = sum(len(cells) for _, cells, *_ in runs.run(resid_pre(3), read))
    assert sizes[0] == handed == N_ROWS
    assert sum(n for n in sizes if n <= 10) == handed


def test_when_not_even_one_intervention_fits_a_sentence_says_what_helps(tiny, monkeypatch):
    model, pairs = tiny("gpt2"), prompts()
    tried, done = out_of_memory_beyond(monkeypatch, 2)  # a patch of all three prompts is three rows
    with refused(OptionError, "^no room in memory for one intervention on 3 prompts: use a smaller batch_size$"):
        activation_patching(model, pairs, "mlp_out", positions="all")
    assert len(tried[-1]) == 3
    assert not done
    activation_patching(model, pairs, "mlp_out", positions="all", batch_size=2)  # it does help


@settings(deadline=None)
@given(data=st.data(), n=st.integers(1, 60), most=st.integers(1, 20))
def test_ranges_are_halved_until_they_fit_and_come_in_order(data, n, most):
    cuts = data.draw(st.sets(st.integers(1, n - 1), max_size=6)) if n > 1 else set()
    edges = [0, *sorted(cuts), n]
    ranges, done = list(pairwise(edges)), []

    def work(first, last):
        if last - first > most:
            raise torch.OutOfMemoryError
        done.append((first, last))
        return first, last

    found = list(in_halves(ranges, work, "this"))
    assert found == done
    assert [i for first, last in found for i in range(first, last)] == list(range(n))
    for first, last in ranges:
        if last - first <= most:
            assert (first, last) in found  # what fits is not cut
        elif last - first > 2 * most:
            assert (first, last) not in found


def test_what_was_handed_out_is_kept_when_a_later_range_fails():
    def work(first, last):
        if last == 5:
            raise torch.OutOfMemoryError
        return first

    found = in_halves([(0, 1), (1, 5)], work, "one of these")
    assert [next(found), next(found)] == [0, 1]
    with pytest.raises(OptionError, match=r"^no room in memory for one of these: use a smaller batch_size$"):
        list(found)


def test_other_errors_are_not_swallowed():
    def work(first, last):
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        list(in_halves([(0, 8)], work, "this"))


# ------------------------------------------------------------------------------------------------------- answer-only logits


def logit_diff_of_all(logits, pairs):
    """logit_diff from the whole vocabulary, prompt by prompt."""
    assert logits.shape[1] == 64
    mean = lambda row, tokens: row[[t for t in tokens.tolist() if t >= 0]].mean()  # noqa: E731
    rows = zip(logits, pairs.answers, pairs.wrong_answers, strict=True)
    return torch.stack([mean(row, right) - mean(row, wrong) for row, right, wrong in rows])


def answer_logit_of_all(logits, pairs):
    assert logits.shape[1] == 64
    return torch.stack([row[tokens[tokens >= 0]].mean() for row, tokens in zip(logits, pairs.answers, strict=True)])


ANSWERS = [5, 6, 7, 9, 11, 30, 31, 32, 33, 40]  # of prompts(), right and wrong


# tied; tied with 1 + w norms; those and soft-capped; with a bias; a norm without weights
@pytest.mark.parametrize("family", ["gpt2", "gemma", "gemma2", "phi", "olmo"])
@pytest.mark.parametrize("metric", ["logit_diff", "answer_logit"])
def test_metrics_of_the_answers_read_their_logits_only_and_come_out_the_same(tiny, columns, family, metric):
    assert_narrow_and_the_same(tiny(family, torch.float64), columns, metric)


def test_a_models_logit_scale_is_in_both(tiny, columns):
    model = copy.deepcopy(tiny("phi", torch.float64))
    model.cfg = dataclasses.replace(model.cfg, logit_scale=0.25)
    assert_narrow_and_the_same(model, columns, "logit_diff")


def assert_narrow_and_the_same(model, columns, metric):
    """Nothing asks for more than the answers' logits, and what comes out is what the whole vocabulary gives."""
    columns.clear()  # what loading the model has asked for
    pairs, interventions = prompts(), some_interventions(model.cfg, 25, 7)
    narrow = exact_scores(model, pairs, interventions, metrics=[get_metric(metric)], base="clean")
    assert columns
    assert all(asked == ANSWERS for asked in columns)
    columns.clear()
    by_hand = get_metric({"logit_diff": logit_diff_of_all, "answer_logit": answer_logit_of_all}[metric])
    whole = exact_scores(model, pairs, interventions, metrics=[by_hand], base="clean")
    assert columns
    assert all(asked is None for asked in columns)
    for name in ("patched", "clean", "corrupt"):
        torch.testing.assert_close(getattr(narrow, name), getattr(whole, name), rtol=1e-10, atol=1e-10)
    assert (narrow.effects.abs() > 0.01).any()


def test_both_metrics_of_the_answers_together_are_narrow_too(tiny, columns):
    model = tiny("gpt2")
    columns.clear()
    activation_patching(model, prompts(), "mlp_out", metric=["logit_diff", "answer_logit"])
    assert columns
    assert all(asked == ANSWERS for asked in columns)


def test_without_wrong_answers_only_the_answers_are_read(tiny, columns):
    pairs = prompts()
    pairs = PromptPairs(pairs.clean, pairs.corrupt, pairs.answers, lengths=pairs.lengths)
    model = tiny("gpt2")
    columns.clear()
    activation_patching(model, pairs, "mlp_out", metric="answer_logit")
    assert columns
    assert all(asked == [5, 6, 7, 9, 11, 40] for asked in columns)


@pytest.mark.parametrize(
    "metric",
    ["kl_divergence", "log_probability", "probability_diff", "accuracy", logit_diff_of_all, ["logit_diff", "kl_divergence"],
     ["answer_logit", answer_logit_of_all]],
    ids=["kl_divergence", "log_probability", "probability_diff", "accuracy", "callable", "two", "a name and a callable"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*is near zero")
def test_any_other_metric_reads_the_whole_vocabulary(tiny, columns, metric):
    model = tiny("gpt2")
    columns.clear()
    activation_patching(model, prompts(), "mlp_out", metric=metric)
    assert columns
    assert all(asked is None for asked in columns)


def test_company_does_not_change_a_narrow_metric(tiny):
    model, pairs = tiny("gemma2", torch.float64), prompts()
    alone = activation_patching(model, pairs, "head", metric="logit_diff")
    beside = activation_patching(model, pairs, "head", metric=["logit_diff", "kl_divergence"]).sel(metric="logit_diff")
    np.testing.assert_allclose(alone, beside, rtol=1e-10, atol=1e-10)


def test_a_metric_that_says_so_is_handed_the_answers_columns(tiny):
    """The pairs then count their answers among the columns; -1 stays -1."""
    seen = []

    def compute(logits, pairs, clean):
        assert logits.shape[1] == len(ANSWERS)
        back = lambda ids: torch.where(ids < 0, -1, torch.tensor(ANSWERS)[ids])  # noqa: E731
        seen.append((back(pairs.answers), back(pairs.wrong_answers)))
        return logits[:, 0]

    pairs = prompts()
    metric = dataclasses.replace(get_metric("answer_logit"), name="first", compute=compute)
    activation_patching(tiny("gpt2"), pairs, "mlp_out", positions="all", metric=metric)
    assert torch.equal(seen[0][0], pairs.answers)
    assert torch.equal(seen[0][1], pairs.wrong_answers)


@settings(max_examples=15, deadline=None)
@given(data=st.data(), n_answers=st.integers(1, 4), n_wrong=st.integers(1, 4), seed=st.integers(0, 10**6))
@pytest.mark.filterwarnings("ignore:.*is near zero")
def test_any_answers_in_any_order(tiny, data, n_answers, n_wrong, seed):
    """Repeated, shared between prompts or between right and wrong, and fewer than others have."""
    model, pairs = tiny("gpt2", torch.float64), prompts()
    ids = lambda width: torch.tensor(  # noqa: E731
        data.draw(
            st.lists(
                st.lists(st.integers(-1, 63), min_size=width, max_size=width).filter(lambda row: max(row) >= 0),
                min_size=3, max_size=3,
            )
        )
    )  # fmt: skip
    pairs = PromptPairs(pairs.clean, pairs.corrupt, ids(n_answers), ids(n_wrong), lengths=pairs.lengths)
    interventions = some_interventions(model.cfg, 6, seed)
    narrow, whole = (
        exact_scores(model, pairs, interventions, metrics=[get_metric(metric)], base="clean").patched
        for metric in ("logit_diff", logit_diff_of_all)
    )
    torch.testing.assert_close(narrow, whole, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("engine", ["sweep", "hooks"])
def test_a_metric_that_breaks_down_names_the_prompts_on_which_it_did(tiny, engine):
    """Not the rows in which it was read."""
    calls = []

    def breaks(logits, pairs):
        calls.append(len(logits))
        unpatched = len(calls) <= 2
        return torch.where((pairs.answers[:, 0] == 7) & (not unpatched), torch.nan, logits[:, 5])

    with refused(MetricError, "^metric breaks is not finite on prompts 2$"):
        activation_patching(tiny("gpt2"), prompts(), "resid_pre", metric=breaks, engine=engine)
    assert len(calls) > 2
