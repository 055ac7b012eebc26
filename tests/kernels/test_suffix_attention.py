"""Attention of packed rows: what plain attention says of the same rows in full, whoever computes it."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interp_kernels import suffix_attention
from tests.kernels.attention_cases import Case, Row, Shape
from tests.small_pairs import refused

TABLES = {
    "a usual suffix": [Row(1, (3, 7), (3, 7), 7), Row(0, (0, 7), (0, 7), 7), Row(2, (6, 7), (6, 7), 7)],
    "one row": [Row(0, (2, 7), (2, 7), 7)],
    "no own keys": [Row(0, (0, 0), (2, 5), 5), Row(2, (4, 4), (4, 7), 7)],
    "own keys in the middle": [Row(0, (2, 4), (2, 7), 7), Row(1, (3, 4), (3, 7), 4)],
    "one query at the end": [Row(0, (2, 7), (6, 7), 7), Row(1, (0, 7), (6, 7), 0), Row(1, (5, 6), (5, 6), 6)],
    "base queries": [Row(0, (1, 6), (1, 7), 3), Row(1, (4, 7), (4, 7), 4), Row(1, (4, 7), (5, 7), 2)],
    "queries before all own keys": [Row(0, (5, 7), (1, 4), 4)],
    "a row that asks for nothing": [Row(0, (2, 7), (4, 4), 4), Row(1, (2, 7), (2, 7), 7)],
    "no rows": [],
}


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_rows_read_their_own_and_else_the_base_run(table, backend, device):
    Case(table, Shape(), device).check(backend, scale=0.25)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("d_head", "group"), [(16, 4), (20, 2), (80, 1)])
def test_dtypes_and_head_sizes(dtype, d_head, group, backend, device):
    shape = Shape(d_head=d_head, group=group, dtype=dtype, index=torch.int32)
    Case(TABLES["base queries"], shape, device).check(backend, scale=d_head**-0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("softcap", "window"), [(None, 1), (None, 3), (0.7, None), (30.0, 2)])
def test_softcap_and_window(softcap, window, dtype, backend, device):
    case = Case(TABLES["own keys in the middle"], Shape(group=2, dtype=dtype), device)
    case.check(backend, scale=0.4, softcap=softcap, window=window)


@pytest.mark.parametrize("window", [None, 9, 40])
def test_rows_longer_than_a_block(window, backend, device):
    table = [Row(0, (20, 75), (20, 75), 75), Row(1, (5, 60), (41, 74), 50)]
    Case(table, Shape(n_positions=75, n_kv_heads=1, group=2), device).check(backend, scale=0.25, window=window)


def test_exact_float32_where_scores_are_large(backend, device):
    """TF32, with its ten bits, would be off in the third digit."""
    case = Case(TABLES["a usual suffix"], Shape(d_head=64), device)
    case.base["k"], case.packed["k"] = case.base["k"] + 100, case.packed["k"] + 100
    z = suffix_attention(*case.arguments(), scale=0.01, backend=backend)
    packed = {name: x.double() for name, x in case.packed.items()}
    exact = suffix_attention(*packed.values(), *(x.double() for x in case.base.values()), case.rows, scale=0.01)
    for first, row in zip(case.out_first, case.table, strict=True):
        here = slice(first, first + row.q[1] - row.q[0])
        assert (z[here].double() - exact[here]).abs().max() < 3e-5


@st.composite
def row_tables(draw) -> list[Row]:
    """Any table that keeps to the rules, over prompts of 9 positions."""
    span = st.tuples(st.integers(0, 9), st.integers(0, 9)).map(lambda pair: (min(pair), max(pair)))
    row = st.builds(Row, prompt=st.integers(0, 2), kv=span, q=span, q_own_stop=st.integers(0, 9))
    return draw(st.lists(row, max_size=4))


@given(
    table=row_tables(),
    window=st.none() | st.integers(1, 9),
    softcap=st.none() | st.floats(0.5, 50),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=1000)
def test_any_table_by_the_reference(table, window, softcap, seed, device):
    case = Case(table, Shape(n_positions=9, group=2, d_head=3, dtype=torch.float64), device, seed)
    case.check("torch", scale=0.5, window=window, softcap=softcap)


@given(
    table=row_tables(), window=st.none() | st.integers(1, 9), group=st.sampled_from([1, 2, 4]), seed=st.integers(0, 99)
)
@settings(deadline=None, max_examples=100)
def test_any_table_by_triton(table, window, group, seed, device):
    pytest.importorskip("triton")
    Case(table, Shape(n_positions=9, n_kv_heads=3, group=group), device, seed).check(
        "triton", scale=0.25, window=window
    )


def test_values_may_be_views(backend, device):
    """Parts of a fused buffer, channels that are no neighbours, addresses that no vector load may take."""
    case = Case(TABLES["own keys in the middle"], Shape(), device)
    plain = suffix_attention(*case.arguments(), scale=0.25, backend=backend)
    fused = torch.stack([case.packed["k"], case.packed["v"]], dim=1)
    shifted = torch.empty(case.base["k"].numel() + 1, device=device)[1:].view_as(case.base["k"]).copy_(case.base["k"])
    wide = torch.cat([case.base["v"], case.base["v"]], dim=1)[:, : case.shape.n_positions]
    strided = case.packed["q"].mT.contiguous().mT
    views = strided, fused[:, 0], fused[:, 1], case.base["q"], shifted, wide, case.rows
    z = suffix_attention(*views, scale=0.25, backend=backend)
    for first, row in zip(case.out_first, case.table, strict=True):
        here = slice(first, first + row.q[1] - row.q[0])
        assert torch.equal(z[here], plain[here])


# --------------------------------------------------------------------------------------------------------- what is refused


def test_shapes_and_dtypes_must_fit(device):
    q, k, v, base_q, base_k, base_v, rows = Case(TABLES["one row"], Shape(group=2), device).arguments()
    with refused(ValueError, "q is torch.float32, but base_v torch.float64"):
        suffix_attention(q, k, v, base_q, base_k, base_v.double(), rows, scale=1.0)
    with refused(ValueError, "a number of axes that does not fit"):
        suffix_attention(q, k, v[0], base_q, base_k, base_v, rows, scale=1.0)
    with refused(ValueError, "q has heads"):
        suffix_attention(q[:, :3], k, v, base_q, base_k, base_v, rows, scale=1.0)
    with refused(ValueError, "k has heads"):
        suffix_attention(q, k, v, base_q, base_k[..., :5], base_v, rows, scale=1.0)
    with refused(ValueError, "as many prompts and positions"):
        suffix_attention(q, k, v, base_q, base_k[:1], base_v, rows, scale=1.0)
    with refused(ValueError, "cannot share"):
        suffix_attention(q[:, :3], k, v, base_q[:, :, :3], base_k, base_v, rows, scale=1.0)
    with refused(ValueError, "a window of 0 sees nothing"):
        suffix_attention(q, k, v, base_q, base_k, base_v, rows, scale=1.0, window=0)
    with refused(ValueError, "rows.q_first must be int32 or int64"):
        wrong = replace(rows, q_first=rows.q_first.to(torch.int16))
        suffix_attention(q, k, v, base_q, base_k, base_v, wrong, scale=1.0)
    with refused(ValueError, "but rows.kv_stop on meta"):
        elsewhere = replace(rows, kv_stop=rows.kv_stop.to("meta"))
        suffix_attention(q, k, v, base_q, base_k, base_v, elsewhere, scale=1.0)


@pytest.mark.parametrize(
    "column", ["prompt", "kv_start", "kv_stop", "kv_first", "q_start", "q_stop", "q_first", "out_first"]
)
@pytest.mark.parametrize("wrong", [-1, 1000])
def test_the_torch_path_checks_every_index(column, wrong, device):
    case = Case(TABLES["a usual suffix"], Shape(), device)
    case.rows = replace(case.rows, **{column: torch.full_like(case.rows.prompt, wrong)})
    with pytest.raises(ValueError, match=r"row 0: .* is out of range"):
        suffix_attention(*case.arguments(), scale=1.0, backend="torch")


def test_more_queries_than_announced(device):
    case = Case(TABLES["one row"], Shape(), device)
    case.rows = replace(case.rows, max_queries=4)
    with pytest.raises(ValueError, match="q_stop is out of range"):
        suffix_attention(*case.arguments(), scale=1.0, backend="torch")


# ------------------------------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_at_the_size_of_gpt2(dtype, gpu):
    table = [Row(r % 3, (r % 15, 15), (r % 15, 15), 15) for r in range(200)]
    shape = Shape(n_positions=15, n_kv_heads=12, d_head=64, dtype=dtype)
    Case(table, shape, gpu).check("auto", scale=1 / math.sqrt(64))
