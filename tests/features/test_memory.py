"""The memory that training is going to take.

Held against: bytes counted by hand for small cases, and the buffers that a stream of batches really makes.
"""

import psutil
import pytest
import torch

from interp.errors import OptionError
from interp.features.config import SAEConfig
from interp.features.memory import MemoryPlan, plan_memory
from interp.features.shuffle import Shuffled
from interp.features.sources import ArraySource
from interp.features.train import train_saes
from tests.small_pairs import refused

SOURCE = ArraySource({"in": torch.zeros(50, 4), "out": torch.zeros(50, 3)})
TOPK = SAEConfig(d_in=4, d_sae=10, k=2, hook="in")


def test_bytes_by_hand():
    """Encoder and decoder 40 + 40; of a token 2 x 10 pre-activations and 5 x (4 + 4) channels; all 50 rows of 7 channels."""
    plan = plan_memory({"one": TOPK}, 8, SOURCE, 1000)
    assert plan == MemoryPlan(16 * 80, 8 * (4 * 2 * 10 + 20 * (4 + 4)), 4 * 50 * 7)
    assert plan.total == 1280 + 1920 + 1400


@pytest.mark.parametrize(
    ("options", "n_weights", "per_token"),
    [
        pytest.param({"architecture": "standard"}, 80, 4 * 6 * 10 + 20 * 8, id="dense codes"),
        pytest.param({"k": 2, "d_out": 3, "skip": True, "apply_b_dec_to_input": False}, 40 + 30 + 12, 80 + 20 * 7,
                     id="transcoder with skip"),
        pytest.param({"architecture": "matryoshka", "k": 2, "widths": (2, 5, 10)}, 80, 80 + 20 * (4 + 3 * 4), id="levels"),
        pytest.param({"k": 2, "kron": (1, 2, 5)}, (2 + 5) * 4 + 40, 80 + 20 * 8, id="kron"),
    ],
)  # fmt: skip
def test_bytes_of_other_shapes(options, n_weights, per_token):
    plan = plan_memory({"one": SAEConfig(d_in=4, d_sae=10, hook="in", **options)}, 8, SOURCE, 1000)
    assert (plan.weights, plan.batch) == (16 * n_weights, 8 * per_token)


def test_weights_add_up_and_batches_do_not():
    small = SAEConfig(d_in=4, d_sae=5, k=2, hook="in")
    both, alone = (plan_memory(configs, 8, SOURCE, 20) for configs in ({"a": TOPK, "b": small}, {"a": TOPK}))
    assert both.weights == alone.weights + 16 * 40
    assert (both.batch, both.buffer) == (alone.batch, alone.buffer)


def test_a_bfloat16_encoder_is_a_copy():
    plans = [plan_memory({"a": TOPK}, 8, SOURCE, 20, dtype) for dtype in ("float32", "bfloat16")]
    assert plans[1].weights - plans[0].weights == 2 * 40


@pytest.mark.parametrize(("batch_size", "buffer"), [(8, 20), (8, 1000), (30, 20), (50, 1)])
def test_the_buffer_is_the_one_that_is_made(batch_size, buffer):
    stream = Shuffled(SOURCE, batch_size, capacity=buffer)
    stream.next()
    made = sum(values.nbytes for values in stream._buffers.values())
    assert plan_memory({"a": TOPK}, batch_size, SOURCE, buffer).buffer == made


def test_a_plan_says_what_it_is():
    plan = MemoryPlan(3 * 2**30, 500 * 2**20, 20 * 2**20)
    assert str(plan) == (
        "training takes 3.5 GiB at its peak: weights, gradients and moments 3.0 GiB, a batch 500 MiB, "
        "the shuffle buffer 20 MiB"
    )
    with refused(
        OptionError, "^training takes 3.5 GiB .*, and there is 1.0 GiB: take a smaller batch_size, buffer or d_sae$"
    ):
        plan.check(None, 2**30)
    plan.check(None, plan.total)


def test_without_a_limit_it_is_what_is_free(monkeypatch):
    free = psutil.virtual_memory()._replace(available=2**20)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    MemoryPlan(2**20, 0, 0).check(None, None)
    with refused(OptionError, "and there is 1 MiB"):
        MemoryPlan(2**20, 1, 0).check("cpu", None)


def test_training_announces_its_plan_before_it_reads_anything(monkeypatch):
    source = ArraySource(SOURCE.values)
    monkeypatch.setattr(source, "read", lambda sequences: pytest.fail("rows were read before the plan was checked"))
    heard = []
    with refused(OptionError, "and there is 0 MiB"):
        train_saes(source, {"a": TOPK}, steps=1, batch_size=8, announce=heard.append, max_memory=1000)
    assert heard == [plan_memory({"a": TOPK}, 8, source, 262_144)]
