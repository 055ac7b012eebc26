"""What a grid will take: FLOPs against a count by hand, shards that are there, jobs that cannot run."""

import numpy as np
import pytest
import torch

from interp.jobs import estimate as module
from interp.jobs.estimate import _Counter, estimate
from interp.jobs.grid import Analysis, Grid
from interp.jobs.runner import run
from interp.jobs.spec import Job

PATCH = Analysis("patch", {"sites": "resid_pre", "positions": [-1]})


def test_flops_are_those_of_the_matrix_products():
    a, b = torch.ones(3, 5), torch.ones(5, 7, requires_grad=True)
    with _Counter() as counter:
        (gradient,) = torch.autograd.grad((a @ b).sum(), b)
    assert gradient.shape == b.shape
    assert counter.total == 2 * (2 * 3 * 5 * 7), "the product, and the one of its gradient"


def test_a_forward_pass_is_counted(mini_gpt2):
    cfg = mini_gpt2.cfg
    with torch.no_grad(), _Counter() as counter:
        mini_gpt2(torch.arange(8)[None] + 5)
    d, inner = cfg.d_model, cfg.n_heads * cfg.d_head
    block = 2 * 8 * (4 * d * inner + 2 * d * cfg.d_mlp) + 2 * 2 * 8 * 8 * inner
    assert counter.total == cfg.n_layers * block + 2 * 8 * d * cfg.d_vocab


def test_what_is_missing_is_what_is_counted(runs, here):
    grid = Grid(models=["mini-gpt2"], tasks=["ioi"], seeds=[0, 1], n=8, block=4, analyses=[PATCH])
    before = estimate(grid, runs)
    assert before.table[["jobs", "shards", "missing"]].values.tolist() == [[2, 4, 4]]
    assert before.weights["mini-gpt2"] > 1e6
    done = Grid(models=["mini-gpt2"], tasks=["ioi"], seeds=[0], n=8, block=4, analyses=[PATCH])
    assert estimate(done, runs).table.flops[0] == pytest.approx(before.table.flops[0] / 2)
    run(grid, runs)
    after = estimate(grid, runs)
    assert after.table.missing.tolist() == [0]
    assert after.seconds == 0
    assert "0 of them missing" in str(after)


def test_flops_grow_with_pairs_and_tokens(runs, here):
    def flops(task: str, n: int) -> float:
        return float(
            estimate(Grid(models=["mini-gpt2"], tasks=[task], n=n, block=n, analyses=[PATCH]), runs).table.flops[0]
        )

    assert flops("ioi", 16) == pytest.approx(2 * flops("ioi", 8), rel=0.01)
    both = Grid(models=["mini-gpt2"], tasks=["ioi", "capitals"], n=8, analyses=[PATCH])
    assert estimate(both, runs).table.flops[0] > flops("ioi", 8)


def test_half_the_time_with_two_workers(runs, here):
    grid = Grid(models=["mini-gpt2"], tasks=["ioi"], n=4, analyses=[PATCH])
    found = estimate(grid, runs, workers=2)
    assert found.seconds == pytest.approx(found.table.seconds.sum() / 2)
    assert "with 2 workers" in str(found)


def test_what_learns_from_text_is_scaled_by_its_steps(runs, here):
    def learned(**options) -> Grid:
        hook = {"hook": "blocks.0.hook_resid_post"}
        return Grid(jobs=[Job("sae", "mini-gpt2", options={**hook, "d_sae": 16, "k": 2, "n_texts": 40, **options})])

    few, many = (estimate(learned(steps=steps), runs).table.flops[0] for steps in (20, 2000))
    assert many == pytest.approx(100 * few, rel=1e-6)
    assert few > 0


def test_a_job_that_cannot_run_is_said(runs, here):
    grid = Grid(
        models=["mini-gpt2"], tasks=["ioi"], analyses=[PATCH, Analysis("patch", {"sites": "head", "window": 99})]
    )
    found = estimate(grid, runs)
    assert list(found.failed.values()) == ["window 99 is not between 1 and the model's 4 layers"]
    assert np.isnan(found.table.flops[1])
    assert "will fail" in str(found)
    assert "?" in str(found)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.5, "0.5 s"), (90.0, "90 s"), (600.0, "10.0 min"), (7200.0, "2.0 h"), (1e6, "11.6 d"), (np.nan, "?")],
)
def test_times_are_told_as_people_do(seconds, text):
    assert module._time(seconds) == text
