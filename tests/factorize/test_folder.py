"""Factorisations on disk: what is written is read bit for bit, and anything else is refused by name."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file

from interp.errors import OptionError
from interp.factorize.folder import load_folder, save_folder
from tests.small_pairs import refused

ABOUT = {"format": "parts/1", "share": 0.1, "n_features": 3, "name": "Ähre"}
READ = {"fields": ("share", "n_features"), "tensors": ("a", "b")}


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    a[0, 0], a[1, 1], a[2, 2] = float("nan"), -0.0, 1e-310
    return {"a": a.T, "b": torch.randn(5, generator=generator).bfloat16(), "c": torch.arange(3)}


@pytest.fixture
def folder(tmp_path, tensors):
    return save_folder(tmp_path / "kept", "parts", tensors, ABOUT)


def test_it_comes_back_bit_for_bit(folder, tensors):
    found, about = load_folder(folder, "parts", "parts/1", **READ)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        as_bytes = lambda t: bytes(t.contiguous().view(torch.uint8).flatten().tolist())  # noqa: E731
        assert as_bytes(found[name]) == as_bytes(tensor)
    assert about.pop("sha256")
    assert about == ABOUT


def test_it_is_two_files_that_others_can_read(folder, tensors):
    assert sorted(os.listdir(folder)) == ["parts.json", "parts.safetensors"]
    assert load_file(folder / "parts.safetensors").keys() == tensors.keys()
    assert json.loads((folder / "parts.json").read_text())["share"] == 0.1


def test_saving_again_replaces_it(folder, tensors):
    save_folder(str(folder), "parts", {"a": tensors["b"], "b": tensors["a"]}, {**ABOUT, "share": 0.2})
    found, about = load_folder(str(folder), "parts", "parts/1", **READ)
    assert torch.equal(found["a"], tensors["b"])
    assert "c" not in found
    assert about["share"] == 0.2


def test_two_names_share_a_folder(folder, tensors):
    save_folder(folder, "others", {"a": tensors["b"]}, {"format": "others/1"})
    assert "c" in load_folder(folder, "parts", "parts/1", **READ)[0]
    assert list(load_folder(folder, "others", "others/1", fields=(), tensors=("a",))[0]) == ["a"]


def test_a_device_is_where_it_comes_to(folder):
    found, _ = load_folder(folder, "parts", "parts/1", **READ, device=torch.device("meta"))
    assert {tensor.device.type for tensor in found.values()} == {"meta"}


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", ["parts.json", "parts.safetensors"])
def test_a_file_that_is_not_there(folder, name):
    (folder / name).unlink()
    with refused(OptionError, f"holds no parts: it has no {name}"):
        load_folder(folder, "parts", "parts/1", **READ)


def test_no_folder_at_all(tmp_path):
    with refused(OptionError, "nowhere holds no parts"):
        load_folder(tmp_path / "nowhere", "parts", "parts/1", **READ)


@pytest.mark.parametrize("at", [0, 8, 100, -1])
def test_one_changed_byte(folder, at):
    path = folder / "parts.safetensors"
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))
    with refused(OptionError, "parts.safetensors is not the file that parts.json was written with"):
        load_folder(folder, "parts", "parts/1", **READ)


def test_another_folders_tensors(folder, tmp_path, tensors):
    other = save_folder(tmp_path / "other", "parts", {**tensors, "b": tensors["b"] + 1}, ABOUT)
    (folder / "parts.safetensors").write_bytes((other / "parts.safetensors").read_bytes())
    with refused(OptionError, "is not the file that"):
        load_folder(folder, "parts", "parts/1", **READ)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe"], ids=["empty", "cut", "binary"])
def test_options_that_are_not_json(folder, content):
    (folder / "parts.json").write_bytes(content)
    with refused(OptionError, "parts.json is not JSON"):
        load_folder(folder, "parts", "parts/1", **READ)


@pytest.mark.parametrize("content", ["[]", "3", "null"])
def test_options_that_are_not_an_object(folder, content):
    (folder / "parts.json").write_text(content)
    with refused(OptionError, "parts.json lacks format: it holds no JSON object"):
        load_folder(folder, "parts", "parts/1", **READ)


@pytest.mark.parametrize("field", ["format", "share", "n_features", "sha256"])
def test_a_field_that_is_missing(folder, field):
    path = folder / "parts.json"
    about = json.loads(path.read_text())
    del about[field]
    path.write_text(json.dumps(about))
    with refused(OptionError, f"parts.json lacks {field}$"):
        load_folder(folder, "parts", "parts/1", **READ)


def test_another_format(folder):
    with refused(OptionError, "is of format 'parts/1', and this reads parts/2"):
        load_folder(folder, "parts", "parts/2", **READ)


def test_tensors_that_are_missing(folder):
    with refused(OptionError, "parts.safetensors lacks d, e$"):
        load_folder(folder, "parts", "parts/1", fields=(), tensors=("a", "d", "e"))


def test_a_file_where_the_folder_should_be(tmp_path, tensors):
    (tmp_path / "taken").write_text("")
    with refused(OptionError, "taken is a file"):
        save_folder(tmp_path / "taken", "parts", tensors, ABOUT)


def test_a_folder_in_no_folder(tmp_path, tensors):
    with refused(OptionError, "the folder .*nowhere does not exist"):
        save_folder(tmp_path / "nowhere" / "kept", "parts", tensors, ABOUT)
