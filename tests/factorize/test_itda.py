"""Dictionaries of real activations: against the row-by-row algorithm by hand, and by what their definition promises."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from interp import load_task
from interp.errors import OptionError, SiteError
from interp.factorize import itda as module
from interp.factorize.itda import ITDA, fit_itda, jaccard
from tests.small_pairs import refused

DOUBLE = torch.float64
HOOK = "blocks.1.hook_resid_post"
SIGNS = pytest.mark.parametrize("positive", [False, True], ids=["signed", "positive"])


def clustered(n: int, d: int = 8, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Tensor:
    """Sums of two of a dozen directions, with noise, around a mean: near-duplicates, and rows that are neither."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=DOUBLE)  # noqa: E731
    directions, picks = draw(12, d), torch.randint(12, (n, 2), generator=generator)
    return (directions[picks].sum(1) * draw(n, 1).exp() + 0.05 * draw(n, d) + 3 * draw(d)).to(dtype)


def places(n: int) -> Tensor:
    return torch.stack([torch.arange(n) // 5, torch.arange(n) % 5], 1)


def pursued(row: Tensor, atoms: list[Tensor], k: int, positive: bool = False) -> Tensor:
    """What is left of a row after k steps, one at a time."""
    left = row.clone()
    for _ in range(k if atoms else 0):
        found = [float(left @ w) for w in atoms]
        best = max(range(len(atoms)), key=lambda i: found[i] if positive else abs(found[i]))
        if positive and found[best] <= 0:
            break
        left = left - found[best] * atoms[best]
    return left


def grown_by_hand(x: Tensor, k: int, threshold: float, *, centre=True, positive=False) -> list[int]:
    """Indices of the rows that are stored, each decided before the next is looked at."""
    atoms, stored = [], []
    for i, row in enumerate(x - x.mean(0) if centre else x):
        if pursued(row, atoms, k, positive).square().sum() / row.square().sum() > max(threshold, 1e-24):
            atoms.append(row / row.norm())
            stored.append(i)
    return stored


# ---------------------------------------------------------------------------------------------------------- the oracle


@SIGNS
@pytest.mark.parametrize("block", [1, 7, 128])
@pytest.mark.parametrize("centre", [True, False], ids=["centred", "as-is"])
@pytest.mark.parametrize(("k", "threshold"), [(1, 0.2), (3, 0.1), (4, 0.02)])
def test_it_stores_the_rows_that_going_one_by_one_would(monkeypatch, k, threshold, centre, block, positive):
    monkeypatch.setattr(module, "BLOCK", block)
    x = clustered(150)
    itda = ITDA(k=k, threshold=threshold, centre=centre, positive=positive, seed=None).fit(x, places(150))
    stored = grown_by_hand(x, k, threshold, centre=centre, positive=positive)
    assert 5 < len(stored) < 120
    assert torch.equal(itda.ids_, places(150)[stored])
    rows = (x - x.mean(0) if centre else x)[stored]
    torch.testing.assert_close(itda.atoms_, rows / rows.norm(dim=1, keepdim=True))
    assert itda.n_seen_ == 150


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.sampled_from([0.0, 0.05, 0.3]), st.integers(1, 40))
def test_cutting_into_batches_changes_nothing(seed, k, threshold, cut):
    """With the mean out of the way, which is the first batch's."""
    x = clustered(60, seed=seed)
    options = {"k": k, "threshold": threshold, "centre": False, "seed": None}
    whole, parts = ITDA(**options).fit(x, places(60)), ITDA(**options)
    for rows, ids in zip(x.split(cut), places(60).split(cut), strict=True):
        parts.partial_fit(rows, ids)
    assert torch.equal(whole.ids_, parts.ids_)
    torch.testing.assert_close(whole.atoms_, parts.atoms_)
    assert grown_by_hand(x, k, threshold, centre=False) == (whole.ids_ @ torch.tensor([5, 1])).tolist()


def test_it_grows_alike_with_and_without_a_gram_matrix(monkeypatch):
    x = clustered(300)
    usual = ITDA(k=4, threshold=0.01).fit(x, places(300))
    monkeypatch.setattr(module, "GRAM_NUMBERS", 64**2)  # outgrown on the way
    assert usual.n_atoms > 64
    assert torch.equal(ITDA(k=4, threshold=0.01).fit(x, places(300)).ids_, usual.ids_)


# ---------------------------------------------------------------------------------------------------------- identities


@SIGNS
@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32, torch.bfloat16], ids=str)
def test_a_stored_row_is_reconstructed_in_one_step(dtype, positive):
    x = clustered(200, dtype=dtype)
    itda = ITDA(k=5, threshold=0.02, positive=positive, seed=None).fit(x, places(200))
    stored = x[(itda.ids_ @ torch.tensor([5, 1]))].to(itda.mean_.dtype)
    values, atoms = itda.encode(stored)
    assert ((values != 0).sum(1) == 1).all()
    assert torch.equal(atoms[:, 0], torch.arange(itda.n_atoms))
    torch.testing.assert_close(values[:, 0], (stored - itda.mean_).norm(dim=1))
    torch.testing.assert_close(itda.reconstruct(stored), stored)


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32], ids=str)
def test_threshold_zero_stores_every_row_that_is_not_exact_already(dtype):
    """Copies, multiples and mirror images of a stored row, sums of two orthogonal ones and the mean itself are exact."""
    a, b, c = 2 * torch.eye(3, dtype=dtype)
    x = torch.stack([a, a, 3 * a, -a, b, a + 2 * b, 0 * a, c, a + c + b, a + 0.1 * c])
    itda = ITDA(k=2, threshold=0.0, centre=False, seed=None).fit(x, places(10))
    assert (itda.ids_ @ torch.tensor([5, 1])).tolist() == [0, 4, 7, 8]
    assert itda.fvu(x) < 1e-12
    distinct = clustered(90, dtype=dtype)
    everything = ITDA(k=1, threshold=0.0).fit(distinct)
    assert everything.n_atoms == 90
    assert everything.fvu(distinct) < 1e-10
    assert everything.partial_fit(distinct).n_atoms == 90


def test_near_duplicates_of_one_batch_are_stored_once():
    x = clustered(1).repeat(50, 1) + 1e-3 * torch.randn(50, 8, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    assert ITDA(k=1, threshold=0.1, centre=False).fit(x).n_atoms == 1


def test_rows_that_do_not_differ_are_their_mean():
    """In float32, where the mean of many equal rows need not be the row to the last bit."""
    x = torch.full((37, 6), 0.1) * torch.arange(1, 7) * 1e3
    itda = ITDA(threshold=0.0).fit(x)
    assert itda.n_atoms == 0
    assert itda.atoms_.shape == (0, 6)
    assert itda.transform(x).shape == (37, 0)
    torch.testing.assert_close(itda.reconstruct(x), x)
    with pytest.raises(OptionError, match="37 rows that do not differ"):
        itda.fvu(x)


def test_every_row_that_went_by_is_below_the_threshold_when_it_does():
    """With one step more atoms can only help, so then it holds to the end."""
    x = clustered(200)
    itda = ITDA(k=1, threshold=0.25).fit(x)
    centred = x - itda.mean_
    left = (x - itda.reconstruct(x)).square().sum(1) / centred.square().sum(1)
    assert left.max() <= 0.25
    torch.testing.assert_close(itda.mean_, x.mean(0))
    torch.testing.assert_close(itda.atoms_.norm(dim=1), torch.ones(itda.n_atoms, dtype=DOUBLE))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.01, 1000))
def test_neither_unit_nor_rotation_matters(seed, scale):
    x = clustered(60, seed=seed)
    turned = scale * x @ torch.linalg.qr(clustered(8, seed=seed + 1))[0]
    plain, other = (ITDA(k=2, threshold=0.1).fit(rows, places(60)) for rows in (x, turned))
    assert torch.equal(plain.ids_, other.ids_)
    assert other.fvu(turned) == pytest.approx(plain.fvu(x), rel=1e-6)


def test_dense_codes_are_the_sparse_ones():
    x = clustered(80)
    itda = ITDA(k=12, threshold=0.1).fit(x)
    values, atoms = itda.encode(x)
    by_row = [row.unique().numel() for row in atoms]
    assert min(by_row) < 12  # atoms repeat, and their slots add up
    dense = itda.transform(x)
    assert dense.shape == (80, itda.n_atoms)
    expected = torch.stack(
        [sum(v * w for v, w in zip(vs, itda.atoms_[i], strict=True)) for vs, i in zip(values, atoms, strict=True)]
    )
    torch.testing.assert_close(dense @ itda.atoms_, expected)
    torch.testing.assert_close(itda.decode(values, atoms), expected + itda.mean_)
    assert torch.equal(itda.reconstruct(x), itda.decode(values, atoms))


def test_fvu_is_about_the_mean_of_what_it_is_given():
    x, other = clustered(80), clustered(40, seed=5) + 10
    itda = ITDA(k=2, threshold=0.3).fit(x)
    for rows in (x, other, other.float()):
        left, around = (rows - itda.reconstruct(rows)).double(), rows.double() - rows.double().mean(0)
        assert itda.fvu(rows) == pytest.approx(float(left.norm() ** 2 / around.norm() ** 2), rel=1e-5)
    assert 0 < itda.fvu(x) < 0.3


# ------------------------------------------------------------------------------------------------------ order and size


def test_the_order_is_the_seeds():
    x, ids = clustered(120), places(120)
    first, again, other = (ITDA(k=2, threshold=0.1, seed=s).fit(x, ids) for s in (3, 3, 4))
    assert torch.equal(first.atoms_, again.atoms_)
    assert torch.equal(first.ids_, again.ids_)
    assert not torch.equal(first.ids_[0], other.ids_[0])
    order = torch.randperm(120, generator=torch.Generator().manual_seed(3))
    given_order = ITDA(k=2, threshold=0.1, seed=None).fit(x[order], ids[order])
    assert torch.equal(given_order.ids_, first.ids_)
    assert torch.equal(first.fit(x, ids).ids_, again.ids_)  # fitting again starts anew
    assert first.n_seen_ == 120


def test_a_full_dictionary_takes_no_more():
    x = clustered(150)
    free = ITDA(k=2, threshold=0.05).fit(x, places(150))
    full = ITDA(k=2, threshold=0.05, max_atoms=9).fit(x, places(150))
    assert free.n_atoms > 9
    assert full.n_atoms == len(full.atoms_) == len(full.ids_) == 9
    assert torch.equal(full.ids_, free.ids_[:9])
    assert full.partial_fit(clustered(20, seed=2), places(20)).n_atoms == 9
    assert full.n_seen_ == 170


def test_more_steps_than_atoms():
    x = clustered(20)
    itda = ITDA(k=50, threshold=0.5).fit(x)
    assert itda.n_atoms < 50
    assert itda.encode(x)[0].shape == (20, 50)


def test_the_mean_is_that_of_the_first_batch():
    x = clustered(90)
    itda = ITDA(threshold=0.5).partial_fit(x[:30]).partial_fit(x[30:])
    torch.testing.assert_close(itda.mean_, x[:30].mean(0))
    assert not ITDA(centre=False, threshold=0.5).fit(x).mean_.any()
    assert ITDA().partial_fit(x).partial_fit(x[:0]).n_seen_ == 90


# ----------------------------------------------------------------------------------------------------------- comparing


def test_jaccard_counts_places():
    x, ids = clustered(120), places(120)
    a = ITDA(k=2, threshold=0.1, seed=None).fit(x, ids)
    b = ITDA(k=2, threshold=0.1, seed=None).fit(clustered(120, seed=7), ids)
    one, two = ({tuple(i) for i in itda.ids_.tolist()} for itda in (a, b))
    assert jaccard(a, a) == 1
    assert jaccard(a, b) == jaccard(b, a) == len(one & two) / len(one | two)
    assert 0 < jaccard(a, b) < 1
    reverse = ITDA(k=2, threshold=0.0, seed=None).fit(x.flip(0), ids.flip(0))
    assert jaccard(reverse, ITDA(k=2, threshold=0.0, seed=None).fit(x, ids)) > 0.8  # nearly all are stored
    apart = ITDA(k=2, threshold=0.1).fit(x, ids + 1000)
    assert jaccard(a, apart) == 0


def test_jaccard_needs_places():
    x, ids = clustered(20), places(20)
    a, b = ITDA(threshold=0.1).fit(x, ids), ITDA(threshold=0.1).fit(x)
    with pytest.raises(OptionError, match="the second dictionary has no ids"):
        jaccard(a, b)
    with pytest.raises(OptionError, match="the first dictionary has no ids"):
        jaccard(b, a)
    empty = ITDA().fit(torch.ones(4, 8), places(4))
    assert jaccard(a, empty) == 0
    with pytest.raises(OptionError, match="neither dictionary has an atom"):
        jaccard(empty, empty)


# ------------------------------------------------------------------------------------------------------------- keeping


@pytest.mark.parametrize("with_ids", [True, False], ids=["ids", "no-ids"])
@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32], ids=str)
def test_what_is_saved_is_what_is_loaded(tmp_path, dtype, with_ids):
    x, ids = clustered(100, dtype=dtype), places(100) if with_ids else None
    itda = ITDA(k=3, threshold=0.07, max_atoms=60, positive=True, seed=None).fit(x, ids)
    itda.source_ = {"model": "toy"}
    folder = itda.save(tmp_path / "kept")
    assert sorted(p.name for p in folder.iterdir()) == ["itda.json", "itda.safetensors"]
    found = ITDA.load(str(folder))
    assert torch.equal(found.atoms_, itda.atoms_)
    assert torch.equal(found.mean_, itda.mean_)
    assert found.ids_ is None if ids is None else torch.equal(found.ids_, itda.ids_)
    for name in ("k", "threshold", "max_atoms", "centre", "positive", "seed", "n_atoms", "n_seen_", "source_"):
        assert getattr(found, name) == getattr(itda, name), name
    assert all(torch.equal(a, b) for a, b in zip(found.encode(x), itda.encode(x), strict=True))
    assert found.save(tmp_path / "again").joinpath("itda.json").read_bytes() == (folder / "itda.json").read_bytes()
    assert set(load_file(folder / "itda.safetensors")) == {"atoms", "mean"} | ({"ids"} if with_ids else set())


def test_fitting_goes_on_after_loading(tmp_path):
    x, ids = clustered(120), places(120)
    itda = ITDA(k=3, threshold=0.02, seed=None).partial_fit(x[:60], ids[:60])
    found = ITDA.load(itda.save(tmp_path / "kept"))
    assert torch.equal(found.partial_fit(x[60:], ids[60:]).ids_, itda.partial_fit(x[60:], ids[60:]).ids_)
    assert found.n_atoms > found.load(tmp_path / "kept").n_atoms


def test_a_file_that_is_not_whole_is_refused(tmp_path):
    folder = ITDA(threshold=0.1).fit(clustered(30)).save(tmp_path / "kept")
    about = json.loads((folder / "itda.json").read_text())
    for name in about:
        (folder / "itda.json").write_text(json.dumps({k: v for k, v in about.items() if k != name}))
        with pytest.raises(OptionError, match=rf"itda\.json lacks {name}$"):
            ITDA.load(folder)
    (folder / "itda.json").write_text(json.dumps(about | {"format": "interp.itda/9"}))
    with pytest.raises(OptionError, match=r"of format 'interp\.itda/9'"):
        ITDA.load(folder)
    (folder / "itda.json").write_text("{")
    with pytest.raises(OptionError, match="is not JSON"):
        ITDA.load(folder)
    (folder / "itda.json").write_text("[]")
    with pytest.raises(OptionError, match="lacks format"):
        ITDA.load(folder)
    other = ITDA(threshold=0.1).fit(clustered(30, seed=1)).save(tmp_path / "other")
    (folder / "itda.json").write_bytes((other / "itda.json").read_bytes())
    with pytest.raises(OptionError, match=r"is not the file that itda\.json was written with"):
        ITDA.load(folder)
    (folder / "itda.safetensors").unlink()
    with pytest.raises(OptionError, match=r"it has no itda\.safetensors"):
        ITDA.load(folder)


def test_places_that_cannot_be_saved_to_are_said(tmp_path):
    itda = ITDA().fit(clustered(10))
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match="file is a file"):
        itda.save(tmp_path / "file")
    with pytest.raises(OptionError, match=r"folder .*nowhere does not exist"):
        itda.save(tmp_path / "nowhere" / "kept")
    with pytest.raises(OptionError, match="no dictionary yet"):
        ITDA().save(tmp_path / "kept")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    with pytest.raises(OptionError, match=r"it has no itda\.json"):
        ITDA.load(tmp_path)


# ------------------------------------------------------------------------------------------------------------ refusing


@pytest.mark.parametrize(
    ("options", "says"),
    [({"k": 0}, "not k=0"), ({"threshold": -0.1}, "not -0.1"), ({"threshold": 1.0}, "below 1, not 1.0"),
     ({"threshold": float("nan")}, "not nan"), ({"max_atoms": 0}, "not max_atoms=0")],
    ids=["k", "negative", "one", "nan", "max"],
)  # fmt: skip
def test_options_are_checked(options, says):
    with pytest.raises(OptionError, match=says):
        ITDA(**options)


def test_rows_are_checked():
    x, ids = clustered(20), places(20)
    itda = ITDA(threshold=0.1).fit(x, ids)
    bad = x.clone()
    bad[3, 1], bad[11, 0] = torch.nan, torch.inf
    for method in (itda.encode, ITDA().partial_fit, itda.fvu, ITDA().fit):
        with pytest.raises(OptionError, match=r"not finite in rows 3, 11$"):
            method(bad)
    for method in (itda.encode, itda.transform, itda.reconstruct):
        with refused(OptionError, "are 5 wide, and those of the dictionary 8"):
            method(x[:, :5])
    with pytest.raises(OptionError, match="are 5 wide"):
        itda.partial_fit(x[:, :5], ids)
    with pytest.raises(OptionError, match="this one has none"):
        itda.partial_fit(x)
    with pytest.raises(OptionError, match="this one has some"):
        ITDA(threshold=0.1).fit(x).partial_fit(x, ids)
    with refused(OptionError, "20 activations came with 19 ids"):
        itda.fit(x, ids[1:])
    with pytest.raises(OptionError, match="nothing to fit"):
        ITDA().fit(x[:0])
    with pytest.raises(OptionError, match="no dictionary yet"):
        ITDA().encode(x)


def test_a_refused_batch_leaves_everything_as_it_was():
    x, ids = clustered(40), places(40)
    itda, bad = ITDA(threshold=0.1), clustered(40) / 0
    with pytest.raises(OptionError, match="not finite"):
        itda.partial_fit(bad, ids)
    itda.partial_fit(x, ids)
    before = itda.atoms_.clone()
    for method in (itda.partial_fit, itda.fit):
        with pytest.raises(OptionError, match="not finite"):
            method(bad, ids)
    assert torch.equal(itda.atoms_, before)
    torch.testing.assert_close(itda.mean_, x.mean(0))
    assert itda.n_seen_ == 40


def test_codes_of_another_dictionary_are_refused():
    itda = ITDA(threshold=0.1).fit(clustered(20))
    with pytest.raises(OptionError, match=f"a dictionary of {itda.n_atoms} does not have"):
        itda.decode(torch.ones(1, 1), torch.tensor([[itda.n_atoms]]))
    with pytest.raises(OptionError, match="a dictionary of 0 does not have"):
        ITDA().fit(torch.ones(4, 8)).decode(torch.ones(1, 1), torch.tensor([[0]]))


# ------------------------------------------------------------------------------------------------------------ on models


@pytest.fixture(scope="module")
def ioi(mini_gpt2):
    return load_task("ioi", mini_gpt2, n=48)


@pytest.fixture(scope="module")
def fitted(mini_gpt2, ioi):
    return fit_itda(mini_gpt2, ioi.clean, HOOK, mask=ioi.is_token, batch_size=16, k=8, threshold=0.2)


@pytest.fixture(scope="module")
def stream(mini_gpt2, ioi):
    """The activations themselves, by another way than `record`."""
    return mini_gpt2.run_with_cache(ioi.clean)[1][HOOK]


def test_atoms_are_the_models_activations(fitted, stream, ioi):
    assert fitted.source_ == {"model": "mini-gpt2", "revision": "local", "hook": HOOK, "skip_first": True}
    assert fitted.n_seen_ == int(ioi.is_token[:, 1:].sum())
    assert 8 < fitted.n_atoms < fitted.n_seen_ / 2
    assert len({tuple(i) for i in fitted.ids_.tolist()}) == fitted.n_atoms
    prompt, position = fitted.ids_.unbind(1)
    assert position.min() >= 1
    assert ioi.is_token[prompt, position].all()
    rows = stream[prompt, position] - fitted.mean_
    torch.testing.assert_close(fitted.atoms_, rows / rows.norm(dim=1, keepdim=True), rtol=1e-4, atol=1e-5)


def test_real_atoms_beat_random_ones(mini_gpt2, fitted):
    """As many random unit vectors, the same mean, the same pursuit, by hand; on prompts that were not gone through."""
    new = load_task("ioi", mini_gpt2, n=16, seed=1)
    rows = mini_gpt2.run_with_cache(new.clean)[1][HOOK][:, 1:][new.is_token[:, 1:]][::4].double()
    w = torch.randn(fitted.n_atoms, rows.shape[1], generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    around = (rows - rows.mean(0)).square().sum()
    fvu = []
    for atoms in (w / w.norm(dim=1, keepdim=True), fitted.atoms_.double()):
        left = torch.stack([pursued(row, list(atoms), fitted.k) for row in rows - fitted.mean_.double()])
        fvu.append(float(left.square().sum() / around))
    assert fitted.fvu(rows) == pytest.approx(fvu[1], rel=1e-3)
    assert fvu[1] < 0.25 < 0.6 < fvu[0]


def test_how_many_prompts_are_run_at_once_does_not_matter(mini_gpt2, ioi, fitted):
    options = {"mask": ioi.is_token[:12], "k": 4, "threshold": 0.2, "centre": False}
    one, more = (fit_itda(mini_gpt2, ioi.clean[:12], HOOK, batch_size=size, **options) for size in (5, 12))
    assert jaccard(one, more) == 1
    again = fit_itda(mini_gpt2, ioi.clean, HOOK, mask=ioi.is_token, batch_size=16, k=8, threshold=0.2)
    assert torch.equal(again.atoms_, fitted.atoms_)
    assert jaccard(again, fitted) == 1


def test_neighbouring_layers_store_more_of_the_same_than_distant_ones(mini_gpt2, ioi):
    options = {"mask": ioi.is_token, "k": 8, "threshold": 0.2}
    layers = [fit_itda(mini_gpt2, ioi.clean, f"blocks.{i}.hook_resid_post", **options) for i in range(4)]
    assert jaccard(layers[0], layers[1]) > jaccard(layers[0], layers[3])


def test_heads_are_laid_side_by_side(mini_gpt2, ioi):
    itda = fit_itda(mini_gpt2, ioi.clean[:8], "blocks.0.attn.hook_z", skip_first=False, k=4, threshold=0.3)
    assert itda.atoms_.shape[1] == 128
    assert itda.n_seen_ == ioi.clean[:8].numel()
    assert not itda.source_["skip_first"]


def test_hooks_and_tokens_are_checked(mini_gpt2, ioi):
    tokens = ioi.clean[:4]
    with pytest.raises(SiteError, match=r"mini-gpt2 has no hook point 'blocks\.9\.hook_resid_post'"):
        fit_itda(mini_gpt2, tokens, "blocks.9.hook_resid_post")
    with pytest.raises(SiteError, match="hook_pattern has no vector at every position"):
        fit_itda(mini_gpt2, tokens[:, :8], "blocks.0.attn.hook_pattern")  # as many heads as positions
    with pytest.raises(OptionError, match="not batch_size=0"):
        fit_itda(mini_gpt2, tokens, HOOK, batch_size=0)
    with pytest.raises(OptionError, match="no token is left"):
        fit_itda(mini_gpt2, tokens[:, :1], HOOK)
    with pytest.raises(OptionError, match="not k=0"):
        fit_itda(mini_gpt2, tokens, HOOK, k=0)
    with refused(OptionError, "the mask of tokens"):
        fit_itda(mini_gpt2, tokens, HOOK, mask=ioi.is_token)
