"""Matching pursuit: against a loop written out by hand, and by what must hold whatever the numbers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from interp.errors import OptionError
from interp.factorize import pursuit
from interp.factorize.pursuit import matching_pursuit
from tests.small_pairs import refused

DOUBLE = torch.float64
SIGNS = pytest.mark.parametrize("positive", [False, True], ids=["signed", "positive"])


def unit_atoms(n: int, d: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Tensor:
    w = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)
    return (w / w.norm(dim=1, keepdim=True)).to(dtype)


def rows_of(n: int, d: int, seed: int = 1, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE).to(dtype)


def by_hand(x: Tensor, atoms: Tensor, k: int, *, positive=False, tolerance=0.0, stop_on_repeat=False):
    """One row and one step at a time, on Python's floats."""
    codes = []
    for row in x.tolist():
        slots: list[tuple[float, int]] = []
        noise = 16 * 2.0**-52 * sum(c * c for c in row) ** 0.5
        for _ in range(k):
            if tolerance > 0 and sum(c * c for c in row) ** 0.5 <= tolerance:
                break
            found = [sum(a * b for a, b in zip(row, w, strict=True)) for w in atoms.tolist()]
            best = max(range(len(found)), key=lambda i: found[i] if positive else abs(found[i]))
            if (found[best] if positive else abs(found[best])) <= noise:
                break
            seen = best in [i for _, i in slots]
            slots.append((found[best], best))
            row = [c - found[best] * w for c, w in zip(row, atoms[best].tolist(), strict=True)]
            if seen and stop_on_repeat:
                break
        slots += [(0.0, 0)] * (k - len(slots))
        codes.append(slots)
    values = torch.tensor([[v for v, _ in slots] for slots in codes], dtype=DOUBLE)
    return values, torch.tensor([[i for _, i in slots] for slots in codes])


def summed(values: Tensor, chosen: Tensor, atoms: Tensor) -> Tensor:
    return (values[..., None] * atoms[chosen]).sum(1)


# ---------------------------------------------------------------------------------------------------------- the oracle


@pytest.mark.parametrize("with_gram", [False, True], ids=["residual", "gram"])
@pytest.mark.parametrize(
    "options",
    [{}, {"positive": True}, {"tolerance": 1.5}, {"stop_on_repeat": True},
     {"positive": True, "tolerance": 1.0, "stop_on_repeat": True}],
    ids=["plain", "positive", "tolerance", "repeat", "all"],
)  # fmt: skip
@pytest.mark.parametrize("shape", [(9, 12, 6, 5), (7, 3, 4, 8), (5, 40, 5, 12)], ids=str)
def test_it_is_the_loop_written_out(shape, options, with_gram):
    n, n_atoms, d, k = shape
    x, atoms = rows_of(n, d), unit_atoms(n_atoms, d)
    gram = atoms @ atoms.T if with_gram else None
    values, chosen = matching_pursuit(x, atoms, k, gram=gram, **options)
    expected, which = by_hand(x, atoms, k, **options)
    torch.testing.assert_close(values, expected, rtol=1e-9, atol=1e-12)
    assert torch.equal(chosen, which)


def test_the_options_are_felt_by_the_oracle():
    """Or the test above says nothing about them."""
    x, atoms = rows_of(9, 6), unit_atoms(12, 6)
    plain = by_hand(x, atoms, 12)[0]
    for options in ({"positive": True}, {"tolerance": 1.5}, {"stop_on_repeat": True}):
        assert not torch.equal(by_hand(x, atoms, 12, **options)[0], plain), options


@SIGNS
def test_both_ways_to_the_correlations_agree(monkeypatch, positive):
    """Whichever is cheaper is chosen by size: forced each way, and in pieces of one row."""
    x, atoms = rows_of(50, 8), unit_atoms(60, 8)
    results = []
    for limit in (0, 1 << 20):
        for at_once in (1, 1 << 20):
            monkeypatch.setattr(pursuit, "GRAM_NUMBERS", limit)
            monkeypatch.setattr(pursuit, "UPDATE", 0)
            monkeypatch.setattr(pursuit, "CORRELATIONS", {"cpu": at_once})
            results.append(matching_pursuit(x, atoms, 10, positive=positive))
    assert pursuit._gram_pays(50, 60, 8, 10)
    for values, chosen in results[1:]:
        torch.testing.assert_close(values, results[0][0], rtol=1e-9, atol=1e-12)
        assert torch.equal(chosen, results[0][1])


def test_a_gram_matrix_is_made_where_it_saves_work():
    assert pursuit._gram_pays(100_000, 2048, 768, 32)
    assert not pursuit._gram_pays(100_000, 2048, 768, 1)  # one step updates nothing
    assert not pursuit._gram_pays(8, 2048, 768, 16)  # too few rows to make it for
    assert not pursuit._gram_pays(10**9, 1 << 16, 768, 32)  # 16 GiB


# ---------------------------------------------------------------------------------------------------------- identities


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 20), st.integers(1, 7), st.integers(1, 12), st.booleans()
)
def test_the_squared_error_falls_by_the_square_of_each_coefficient(seed, n, n_atoms, d, k, positive):
    x, atoms = rows_of(n, d, seed), unit_atoms(n_atoms, d, seed + 1)
    values, chosen = matching_pursuit(x, atoms, k, positive=positive)
    left = x - summed(values, chosen, atoms)
    torch.testing.assert_close(left.square().sum(1) + values.square().sum(1), x.square().sum(1), rtol=1e-9, atol=1e-12)
    # Used slots come first, and unused ones are 0 in both.
    used = values != 0
    assert (used[:, :-1] | ~used[:, 1:]).all()
    assert (chosen[~used] == 0).all()
    if positive:
        assert (values >= 0).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.01, 100), st.integers(1, 8))
def test_it_is_as_large_as_the_row(seed, scale, k):
    """A code scales with its row, and changes sign with it where both signs are allowed; fewer steps are its beginning."""
    x, atoms = rows_of(4, 5, seed), unit_atoms(9, 5, seed + 1)
    values, chosen = matching_pursuit(x, atoms, k)
    larger, same = matching_pursuit(-scale * x, atoms, k)
    torch.testing.assert_close(larger, -scale * values, rtol=1e-7, atol=1e-10)
    assert torch.equal(same, chosen)
    fewer = matching_pursuit(x, atoms, max(1, k - 1))
    torch.testing.assert_close(fewer[0], values[:, : max(1, k - 1)], rtol=1e-7, atol=1e-10)
    assert torch.equal(fewer[1], chosen[:, : max(1, k - 1)])


@SIGNS
def test_orthonormal_atoms_give_the_largest_coordinates(positive):
    """The k largest entries of x, by size or by value, and all of x with as many steps as there are dimensions."""
    basis = torch.linalg.qr(rows_of(6, 6, 3))[0]
    x = rows_of(20, 6)
    coordinates = x @ basis.T
    values, chosen = matching_pursuit(x, basis, 4, positive=positive)
    ranked = (coordinates.relu() if positive else coordinates.abs()).topk(4, dim=1)
    torch.testing.assert_close(values.abs(), ranked.values, rtol=1e-9, atol=1e-12)
    assert torch.equal(chosen[values != 0], ranked.indices[ranked.values > 0])
    if not positive:
        torch.testing.assert_close(summed(*matching_pursuit(x, basis, 6), basis), x)


@SIGNS
def test_an_atom_is_its_own_code(positive):
    """In one step, and rounding is left: with a tolerance above it nothing else is used."""
    atoms = unit_atoms(30, 8)
    values, chosen = matching_pursuit(3 * atoms, atoms, 4, positive=positive, tolerance=1e-12)
    assert torch.equal(chosen[:, 0], torch.arange(30))
    torch.testing.assert_close(values, torch.tensor([3.0, 0, 0, 0], dtype=DOUBLE).expand(30, 4))


def test_a_row_against_all_atoms_has_no_positive_code():
    values, chosen = matching_pursuit(-torch.ones(2, 3), torch.eye(3), 2, positive=True)
    assert not values.any()
    assert not chosen.any()


def test_a_short_row_takes_no_step_and_a_long_one_stops_when_it_is_short():
    x = torch.tensor([[3.0, 2.0, 1.0], [0.5, 0.0, 0.0], [0.0, 0.0, 0.0]])
    values, _ = matching_pursuit(x, torch.eye(3), 3, tolerance=1.0)
    assert values.tolist() == [[3, 2, 0], [0, 0, 0], [0, 0, 0]]  # what is left of the first is 1.0 exactly


def test_a_repeated_atom_has_two_slots_and_may_be_the_last():
    """Two atoms at 45 degrees, and a row between them: pursuit goes back and forth."""
    atoms = torch.tensor([[1.0, 0.0], [0.5**0.5, 0.5**0.5]])
    x = torch.tensor([[0.9, 2.0]])
    _, chosen = matching_pursuit(x, atoms, 4)
    assert chosen.tolist() == [[1, 0, 1, 0]]
    values, chosen = matching_pursuit(x, atoms, 4, stop_on_repeat=True)
    assert chosen.tolist() == [[1, 0, 1, 0]]
    assert (values != 0).tolist() == [[True, True, True, False]]


def test_of_equals_the_first_is_taken():
    atoms = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    assert matching_pursuit(torch.tensor([[2.0, 1.0]]), atoms, 2)[1].tolist() == [[1, 0]]


def test_gradients_are_those_of_the_chosen_coefficients():
    x, raw = rows_of(3, 4).requires_grad_(), rows_of(6, 4, 5).requires_grad_()

    def code(x: Tensor, raw: Tensor) -> Tensor:
        return matching_pursuit(x, raw / raw.norm(dim=1, keepdim=True), 3)[0]

    assert torch.autograd.gradcheck(code, (x, raw))
    values = matching_pursuit(x, unit_atoms(200, 4), 6)[0]  # by the Gram matrix, where one is made
    (gradient,) = torch.autograd.grad(values[:, 0].sum(), x)
    torch.testing.assert_close(gradient, unit_atoms(200, 4)[matching_pursuit(x, unit_atoms(200, 4), 1)[1][:, 0]])


# ------------------------------------------------------------------------------------------------------ dtypes, errors


def test_narrow_numbers_are_summed_in_float32():
    x, atoms = rows_of(5, 8, dtype=torch.bfloat16), unit_atoms(20, 8, dtype=torch.bfloat16)
    values, chosen = matching_pursuit(x, atoms, 4)
    wide = matching_pursuit(x.float(), atoms.float(), 4)
    assert values.dtype == torch.float32
    assert chosen.dtype == torch.long
    assert torch.equal(values, wide[0])
    assert torch.equal(chosen, wide[1])
    assert matching_pursuit(x.double(), atoms, 4)[0].dtype == DOUBLE


@pytest.mark.parametrize(("n", "n_atoms"), [(0, 3), (4, 0), (0, 0)])
def test_nothing_has_no_code(n, n_atoms):
    values, chosen = matching_pursuit(torch.zeros(n, 2), torch.eye(2)[:1].repeat(n_atoms, 1), 3)
    assert values.shape == chosen.shape == (n, 3)
    assert not values.any()


@SIGNS
def test_what_is_not_a_number_stays_so(positive):
    values, _ = matching_pursuit(torch.tensor([[torch.nan, 1.0], [1.0, 2.0]]), torch.eye(2), 2, positive=positive)
    assert values[0].isnan().all()
    assert values[1].tolist() == [2, 1]


def test_what_cannot_be_is_said():
    x = torch.ones(2, 3)
    with pytest.raises(OptionError, match="at least one step, not k=0"):
        matching_pursuit(x, torch.eye(3), 0)
    with pytest.raises(OptionError, match="is a norm, not -1"):
        matching_pursuit(x, torch.eye(3), 1, tolerance=-1.0)
    with pytest.raises(OptionError, match="is a norm, not nan"):
        matching_pursuit(x, torch.eye(3), 1, tolerance=float("nan"))
    with pytest.raises(OptionError, match=r"unit atoms, and these are not: 1, 2$"):
        matching_pursuit(x, torch.diag(torch.tensor([1.0, 2.0, 0.0])), 1)
    with refused(OptionError, "rows of width 3 are no sums of atoms of width 4"):
        matching_pursuit(x, torch.eye(4), 1)
