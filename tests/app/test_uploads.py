"""SAEs that a reader uploads: opened from two files, refused in a sentence, and nothing of a refused one stays."""

import json
from pathlib import Path

import numpy as np
import pytest

from app import dictionaries as data
from app import uploads
from app.behaviour import Behaviour
from app.steered import dictionary_code
from interp import bundled_saes
from interp.errors import LoadError, SiteError
from interp.features.saelens_format import CONFIG, SCALER, WEIGHTS
from tests.small_pairs import refused

SAE = "mini-gpt2/resid_post2"


def files(name: str = SAE) -> dict[str, bytes]:
    return {part: (bundled_saes()[name] / part).read_bytes() for part in uploads.NEEDED}


def kept() -> list[Path]:
    return sorted(Path(uploads._folder().name).iterdir())


def test_two_files_are_the_sae_that_they_were():
    source, hook = uploads.store("mini-gpt2", files())
    assert source.startswith(uploads.PREFIX)
    assert hook == "blocks.2.hook_resid_post"
    here = Behaviour(n=2)
    assert np.array_equal(data.prompt_codes(here, 0, source)[1], data.prompt_codes(here, 0, SAE)[1])
    assert uploads.store("mini-gpt2", files()) == (source, hook), "the same content is the same dictionary"
    assert "FOLDER" in dictionary_code(source)[0]


def changed(**fields) -> dict[str, bytes]:
    """An SAE whose cfg.json, without what interp adds, says something else."""
    found = files()
    said = {key: value for key, value in json.loads(found[CONFIG]).items() if key != "interp"}
    return found | {CONFIG: json.dumps(said | fields).encode()}


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({CONFIG: b"{}"}, LoadError, f"{WEIGHTS} is missing"),
        ({"sae.pkl": b"", **files()}, LoadError, "'sae.pkl' is no file of an SAE"),
        ({f"../{CONFIG}": b"{}"}, LoadError, "is no file of an SAE"),
        (files() | {CONFIG: b" " * (2**20 + 1)}, LoadError, "and the dashboard takes 1"),
        (files() | {CONFIG: b"not json"}, LoadError, "is not JSON"),
        (files() | {CONFIG: b"[" * 100_000}, LoadError, "nested too deeply"),
        (files() | {WEIGHTS: b"\x80\x04N."}, LoadError, f"{WEIGHTS} is damaged"),
        (files() | {WEIGHTS: files()[WEIGHTS][:-8]}, LoadError, f"{WEIGHTS} is damaged"),
        (changed(d_sae=3), LoadError, "has shape"),
        (changed(normalize_activations="expected_average_only_in"), LoadError, f"choose {SCALER} too"),
        (changed(metadata={"hook_name": "blocks.9.hook_resid_post"}), SiteError, "has no such hook point"),
        (changed(metadata={"hook_name": "blocks.2.mlp.hook_post"}), SiteError, "blocks.2.mlp.hook_post"),
    ],
    ids=["one", "pickle", "path", "large", "no JSON", "deep", "weights", "cut", "shapes", "scale", "hook", "width"],
)  # fmt: skip
def test_what_is_no_sae_of_this_model_is_refused_and_not_kept(given, error, says):
    before = kept()
    with refused(error, says):
        uploads.store("mini-gpt2", given)
    assert kept() == before


def test_no_path_of_the_server_is_told():
    with pytest.raises(LoadError) as caught:
        uploads.store("mini-gpt2", files() | {WEIGHTS: b""})
    assert str(Path(uploads._folder().name)) not in str(caught.value)


def test_numbers_that_are_not_finite_are_refused():
    found = files()
    with refused(LoadError, "not finite"):
        uploads.store("mini-gpt2", found | {WEIGHTS: _with_a_nan(found[WEIGHTS])})


def _with_a_nan(content: bytes) -> bytes:
    start = 8 + int.from_bytes(content[:8], "little")  # of the decoder, behind the header
    return content[:start] + np.float32("nan").tobytes() + content[start + 4 :]


@pytest.mark.parametrize("source", ["upload/", "upload/..", "upload/../x", "upload/0123", "mini-gpt2/resid_post2"])
def test_names_that_are_no_uploads(source):
    assert uploads.folder_of(source) is None


def test_the_oldest_goes(monkeypatch):
    monkeypatch.setattr(uploads, "MAX_KEPT", 1)
    first, _ = uploads.store("mini-gpt2", files())
    second, _ = uploads.store("mini-gpt2", files("mini-gpt2/transcoder1"))
    assert uploads.folder_of(first) is None
    assert uploads.folder_of(second) is not None


def test_it_is_opened_on_the_page(page):
    at = page("features", n="2", texts="50")
    field = at.get("file_uploader")[0]
    field.set_value([(name, content, "application/octet-stream") for name, content in files().items()]).run()
    assert not at.exception
    assert not at.error
    assert at.selectbox(key="source").value.startswith(uploads.PREFIX)
    assert at.subheader[0].value.startswith("Latent ")
    assert any("trained on mini" in caption.value for caption in at.caption)


def test_a_wrong_file_is_one_sentence_on_the_page(page):
    at = page("features", n="2", texts="50")
    at.get("file_uploader")[0].set_value([(CONFIG, b"{}", "application/json")]).run()
    assert not at.exception
    assert "is missing" in at.error[0].value
