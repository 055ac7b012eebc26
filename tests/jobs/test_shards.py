"""A shard's id says everything that decides its numbers, and shards cover the prompts once."""

import shutil
import subprocess
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import interp
from interp.bundled import bundled_models
from interp.errors import LoadError
from interp.jobs import shards
from interp.jobs.shards import code_version, environment_of, identities_of, identity, shards_of
from interp.jobs.spec import Job
from tests.jobs.small_grids import GRID, JOB
from tests.small_pairs import refused


def ids(job=JOB, identity="files:0", device="cpu"):
    return [shard.id for shard in shards_of([job], {"mini-gpt2": identity}, environment_of(device))]


@given(st.integers(1, 40), st.integers(1, 40))
def test_shards_cover_the_prompts_once(n, block):
    found = list(shards_of([replace(JOB, n=n, block=block)], {"mini-gpt2": "files:0"}, "cpu"))
    assert [i for shard in found for i in range(shard.first, shard.beyond)] == list(range(n))
    assert all(shard.beyond - shard.first == block for shard in found[:-1])


def test_every_shard_of_a_grid_has_a_name_of_its_own():
    found = list(shards_of(GRID.everything, {"mini-gpt2": "files:0"}, "cpu"))
    assert len({shard.id for shard in found}) == len(found) == 48
    assert all(len(shard.id) == 16 for shard in found)


def test_what_decides_the_numbers_is_in_the_id(monkeypatch):
    before = ids()
    assert ids() == before
    others = [ids(replace(JOB, seed=1)), ids(identity="files:1"), ids(device="mps")]
    for module in (interp, torch):
        with monkeypatch.context() as patch:
            patch.setattr(module, "__version__", "0.0.0")
            others.append(ids())
    assert not {*before} & {id for other in others for id in other}


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(bundled_models()["mini-gpt2"], tmp_path / "model")


def test_a_models_identity_is_its_files(folder, tmp_path):
    assert identity(str(folder)) == identity("mini-gpt2"), "wherever they lie"
    (folder / "README.md").write_text("read by nobody")
    assert identity(str(folder)) == identity("mini-gpt2")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_another_bit_is_another_model(folder, name):
    path = folder / name
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert identity(str(folder)) != identity("mini-gpt2")


def test_a_file_that_is_gone_or_renamed_is_another_model(folder):
    (folder / "training.json").rename(folder / "other.json")
    assert identity(str(folder)) != identity("mini-gpt2")


def test_a_model_that_is_not_there():
    with refused(LoadError, "'no/such-model' is neither a bundled model"):
        identity("no/such-model")


def test_a_text_that_is_learned_from_is_in_the_id(tmp_path):
    text = tmp_path / "text.txt"
    job = Job("snmf", "mini-gpt2", options={"hook": "blocks.0.mlp.hook_post", "text": str(text)})
    found = {}
    for content in (None, "a", "b", "a"):
        if content is not None:
            text.write_text(content)
        identities = identities_of([job])
        found.setdefault(content, []).append([shard.id for shard in shards_of([job], identities, "cpu")])
    assert found["a"][0] == found["a"][1]
    assert len({str(ids[0]) for ids in found.values()}) == 3
    assert identities_of([JOB]) == {"mini-gpt2": identity("mini-gpt2")}


def test_the_code_is_named(monkeypatch, tmp_path):
    assert code_version()["interp"] == interp.__version__

    def no_git(*args, **kwargs):
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", no_git)
    assert "commit" not in code_version()
    monkeypatch.setattr(shards.interp, "__file__", str(tmp_path / "interp" / "__init__.py"))
    assert code_version() == {"interp": interp.__version__}


def test_a_shard_says_what_it_is():
    shard = next(shards_of([Job("circuit", "mini-gpt2", task="ioi", n=4)], {"mini-gpt2": "files:0"}, "cpu"))
    assert str(shard) == f"{shard.id} (circuit mini-gpt2 on ioi, n 4, seed 0, prompts 0 to 3)"
