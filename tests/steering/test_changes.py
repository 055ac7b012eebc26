"""Changes of activations in a run.

Held against: identities that change nothing, the formulas on what was recorded, runs of one row each, weights by hand.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from interp.errors import OptionError, SiteError
from interp.model.run import record
from interp.steering.changes import Change, one_hot, steer, steer_hooks, where_of
from tests.small_pairs import refused

TOKENS = torch.tensor([[1, 5, 7, 4, 9], [1, 8, 8, 6, 3]])
HOOKS = [
    "blocks.1.hook_resid_pre",
    "blocks.1.attn.hook_z",
    "blocks.1.mlp.hook_post",
    "blocks.0.hook_mlp_out",
    "hook_embed",
]


def width(model, hook: str) -> int:
    return record(model, TOKENS, [hook])[hook][0, 0].numel()


def random_direction(model, hook: str, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(width(model, hook), generator=generator, dtype=torch.float64)


def at(model, hook: str, changes) -> torch.Tensor:
    """[batch, position, d], as the changes leave it."""
    return record(model, TOKENS, [hook], steer_hooks(model, changes))[hook].flatten(2)


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_changes_that_change_nothing(tiny, family, hook):
    model = tiny(family, torch.float64)
    d = random_direction(model, hook)
    clean = model(TOKENS)
    for mode, value in (("add", 0.0), ("scale", 1.0)):
        with steer(model, [Change(hook, d, mode, value)]):
            assert torch.equal(model(TOKENS), clean)
    own = record(model, TOKENS, [hook])[hook].flatten(2)[:, -1] @ (d / d.norm())
    with steer(model, [Change(hook, d, "clamp", own, "last")]):
        torch.testing.assert_close(model(TOKENS), clean, rtol=0, atol=1e-12)
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


@pytest.mark.parametrize("hook", HOOKS)
def test_the_formulas(tiny, hook):
    model = tiny("llama", torch.float64)
    d, v = random_direction(model, hook), 1.7
    u, a = d / d.norm(), record(model, TOKENS, [hook])[hook].flatten(2)
    along = (a @ u)[..., None]
    for mode, value, expected in (
        ("add", v, a + v * u),
        ("clamp", v, a + (v - along) * u),
        ("scale", v, a + (v - 1) * along * u),
        ("ablate", None, a - along * u),
    ):
        torch.testing.assert_close(at(model, hook, [Change(hook, d, mode, value)]), expected, rtol=0, atol=1e-12)
        # a direction's length never counts
        torch.testing.assert_close(at(model, hook, [Change(hook, 50 * d, mode, value)]), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("hook", HOOKS)
def test_what_they_do_along_the_direction(tiny, hook):
    model = tiny("gpt2", torch.float64)
    d = random_direction(model, hook)
    u = d / d.norm()
    clamped = at(model, hook, [Change(hook, d, "clamp", -2.5)]) @ u
    torch.testing.assert_close(clamped, torch.full_like(clamped, -2.5))
    ablated = at(model, hook, [Change(hook, d, "ablate")])
    assert (ablated @ u).abs().max() < 1e-12
    for same in (("clamp", 0.0), ("scale", 0.0)):
        torch.testing.assert_close(at(model, hook, [Change(hook, d, *same)]), ablated, rtol=0, atol=1e-12)


def test_layers_before_are_bit_identical(mini_llama):
    tokens, hook = torch.arange(10, 20).reshape(2, 5), "blocks.2.mlp.hook_post"
    before = [n for n in mini_llama.hook_dict if n.startswith(("blocks.0", "blocks.1", "blocks.2.attn", "blocks.2.ln"))]
    after = "blocks.2.hook_mlp_out"
    clean = record(mini_llama, tokens, [*before, after])
    hooks = steer_hooks(mini_llama, [Change.of_unit(mini_llama, hook, 3, value=5.0)])
    changed = record(mini_llama, tokens, [*before, after], hooks)
    assert all(torch.equal(clean[name], changed[name]) for name in before)
    assert not torch.equal(clean[after], changed[after])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("place", ["mlp.hook_post", "mlp.hook_pre_linear"])
def test_a_clamped_unit_has_the_value(tiny, place, dtype):
    """Exactly, whatever it was; nothing else moves."""
    model, hook = tiny("llama", dtype), f"blocks.1.{place}"
    clean = record(model, TOKENS, [hook])[hook]
    changed = at(model, hook, [Change.of_unit(model, hook, 4, value=0.1)])
    assert (changed[..., 4] == torch.tensor(0.1, dtype=dtype)).all()
    others = torch.arange(clean.shape[2]) != 4
    assert torch.equal(changed[..., others], clean[..., others])
    own = Change.of_unit(model, hook, 4, value=clean[:, 2, 4], positions=(2,))
    assert torch.equal(at(model, hook, [own]), clean)


def test_a_neuron_moves_what_the_mlp_writes_by_its_weights(tiny):
    model = tiny("gpt2", torch.float64)
    hook, out = "blocks.1.mlp.hook_post", "blocks.1.hook_mlp_out"
    clean = record(model, TOKENS, [out])[out]
    changed = record(model, TOKENS, [out], steer_hooks(model, [Change.of_unit(model, hook, 9, mode="add", value=2.0)]))[
        out
    ]
    torch.testing.assert_close(changed - clean, (2 * model.blocks[1].mlp.W_out[9]).expand_as(clean))


@pytest.mark.parametrize("mode", ["add", "clamp", "scale"])
def test_a_value_for_each_row_is_a_run_for_each(tiny, mode):
    model, hook = tiny("llama", torch.float64), "blocks.1.attn.hook_z"
    d = torch.stack([random_direction(model, hook, seed) for seed in (0, 1, 2)])
    values, tokens = torch.tensor([0.5, -2.0, 3.0], dtype=torch.float64), TOKENS[:1].expand(3, -1)
    with steer(model, [Change(hook, d[0], mode, values)]):
        together = model(tokens)
    with steer(model, [Change(hook, d, mode, values)]):
        of_each = model(tokens)
    for i, value in enumerate(values.tolist()):
        with steer(model, [Change(hook, d[0], mode, value)]):
            torch.testing.assert_close(model(TOKENS[:1])[0], together[i])
        with steer(model, [Change(hook, d[i], mode, value)]):
            torch.testing.assert_close(model(TOKENS[:1])[0], of_each[i])


def test_changes_act_one_after_another(tiny):
    model, hook = tiny("gpt2", torch.float64), "blocks.1.hook_resid_pre"
    first, second = (random_direction(model, hook, seed) for seed in (0, 1))
    both = at(model, hook, [Change(hook, first, "add", 2.0), Change(hook, second, "ablate")])
    u = second / second.norm()
    assert (both @ u).abs().max() < 1e-12
    undone = at(model, hook, [Change(hook, first, "add", 2.0), Change(hook, -first, "add", 2.0)])
    torch.testing.assert_close(undone, at(model, hook, []))


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        ("all", [0, 1, 2, 3, 4]), ("last", [4]), ("not first", [1, 2, 3, 4]), ((0, 3), [0, 3]), ((-1, -5), [0, 4]),
        ((2, -3), [2]), ((), []),
    ],
    ids=str,
)  # fmt: skip
def test_positions(tiny, positions, expected):
    model, hook = tiny("gpt2"), "blocks.1.hook_resid_pre"
    clean = at(model, hook, [])
    moved = at(model, hook, [Change(hook, torch.ones(32), "add", 1.0, positions)]) != clean
    assert torch.equal(moved.any(-1), torch.isin(torch.arange(5), torch.tensor(expected)).expand(2, 5))


@given(st.lists(st.integers(3, 9), min_size=1, max_size=4), st.lists(st.integers(-3, 2), max_size=3))
def test_positions_count_from_each_rows_end(lengths, positions):
    where = where_of(tuple(positions), torch.tensor(lengths), 9)
    for row, length in zip(where.tolist(), lengths, strict=True):
        tokens = [False] * length
        for position in positions:
            tokens[position] = True
        assert row == tokens + [False] * (9 - length)


def test_padded_rows_have_their_own_last(tiny):
    model, hook = tiny("gpt2", torch.float64), "blocks.1.hook_resid_pre"
    change = Change(hook, random_direction(model, hook), "add", 2.0, "last")
    with steer(model, [change]):
        alone = model(TOKENS[:1, :3])
    with steer(model, [change], lengths=torch.tensor([3, 5])):
        padded = model(TOKENS)[:1, :3]
    torch.testing.assert_close(padded, alone)


def test_refusals(tiny):
    model, hook, ones = tiny("gpt2"), "blocks.1.hook_resid_pre", torch.ones(32)
    with refused(OptionError, "'multiply' is not a way to change an activation"):
        Change(hook, ones, "multiply", 1.0)
    with refused(OptionError, "'first' is not a choice of positions"):
        Change(hook, ones, "add", 1.0, "first")
    with refused(OptionError, "mode 'add', which has a value"):
        Change(hook, ones)
    with refused(OptionError, "mode 'ablate', which has no value"):
        Change(hook, ones, "ablate", 1.0)
    with refused(OptionError, f"direction at {hook} has a norm of 0"):
        Change(hook, 0 * ones, "add", 1.0)
    with refused(OptionError, "not finite"):
        Change(hook, ones / 0, "add", 1.0)
    with refused(SiteError, "no hook point 'blocks.9.hook_resid_pre'"):
        steer_hooks(model, [Change("blocks.9.hook_resid_pre", ones, "add", 1.0)])
    for unfit in ("blocks.1.attn.hook_pattern", "blocks.0.attn.hook_attn_scores", "ln_final.hook_normalized"):
        with refused(SiteError, f"{unfit} cannot be steered"):
            steer_hooks(model, [Change(unfit, ones, "add", 1.0)])
    with refused(SiteError, "hook_z has channels 0 to 31, not 32"):
        one_hot(model, "blocks.1.attn.hook_z", 32)
    for change, error, says in (
        (Change(hook, torch.ones(31), "add", 1.0), SiteError, f"direction at {hook} has 31 entries, and the hook 32"),
        (Change(hook, ones, "add", torch.ones(3)), OptionError, f"change at {hook} has 3 values, and the batch 2 rows"),
        (Change(hook, torch.ones(3, 32), "add", 1.0), OptionError, "has 3 directions, and the batch 2 rows"),
        (
            Change(hook, ones, "add", 1.0, (5,)),
            SiteError,
            f"change at {hook} is for position 5, and a prompt has 5 tokens",
        ),
        (Change(hook, ones, "add", 1.0, (-6,)), SiteError, "is for position -6"),
    ):
        with refused(error, says), steer(model, [change]):
            model(TOKENS)
    change, says = Change(hook, ones, "add", 1.0), "lengths of 3 rows, and the batch has 2"
    with refused(OptionError, says), steer(model, [change], lengths=torch.tensor([1, 2, 3])):
        model(TOKENS)
