"""`load_model`: what it takes, and that whatever is wrong with a model comes out as one sentence naming it."""

import json
import shutil
import time

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file

import interp
from interp import Transformer, bundled_models, load_model
from interp.errors import InterpError, LoadError


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """A copy of a good model folder, to be damaged."""
    return shutil.copytree(tiny_folder("gpt2"), tmp_path / "damaged")


def refusal(name, **options) -> str:
    with pytest.raises(LoadError) as caught:
        load_model(name, **options)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    assert isinstance(caught.value, InterpError)
    return message


def test_a_folder_loads_by_path_and_by_string(tiny_folder):
    folder = tiny_folder("llama")
    by_path, by_string = load_model(folder), load_model(str(folder))
    tokens = torch.arange(5)[None]
    assert isinstance(by_path, Transformer)
    assert by_path.cfg == by_string.cfg
    assert by_path.cfg.name == folder.name
    assert torch.equal(by_path(tokens), by_string(tokens))


def test_dtype_none_is_the_checkpoints_own(tiny_folder):
    assert load_model(tiny_folder("gpt2", torch.float64)).dtype == torch.float64
    assert load_model(tiny_folder("gpt2")).dtype == torch.float32


@pytest.mark.parametrize("dtype", ["float64", torch.float64])
def test_dtype_by_name_or_value(dtype, tiny_folder):
    model = load_model(tiny_folder("llama"), dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert model(torch.arange(4)[None]).dtype == torch.float64


@pytest.mark.parametrize("name", ["gpt2", "llama3", "gemma2", "pythia"])
def test_bfloat16_loads_and_stays_near_float32(name, tiny_folder, tiny):
    model = load_model(tiny_folder(name), dtype=torch.bfloat16)
    tokens = torch.arange(4, 16)[None]
    logits = model(tokens)
    assert model.dtype == logits.dtype == torch.bfloat16
    reference = tiny(name)(tokens)
    assert (logits.float() - reference).abs().max() < 0.1 * reference.abs().max()


def test_device_is_torchs_default_unless_given(tiny_folder):
    assert load_model(tiny_folder("gpt2")).device == torch.get_default_device() == torch.device("cpu")
    assert load_model(tiny_folder("gpt2"), device="cpu").device == torch.device("cpu")


def test_loading_leaves_the_libraries_settings_alone(tiny_folder):
    from transformers.utils import logging

    def settings():
        return (
            logging.get_verbosity(),
            logging.is_progress_bar_enabled(),
            torch.is_grad_enabled(),
            torch.get_default_dtype(),
        )

    before = settings()
    load_model(tiny_folder("gpt2"), dtype=torch.float64)
    assert settings() == before


def test_loading_draws_no_random_numbers(tiny_folder):
    state = torch.get_rng_state()
    load_model(tiny_folder("gpt2"))
    assert torch.equal(torch.get_rng_state(), state)


def test_loading_prints_nothing(tiny_folder, capfd):
    load_model(tiny_folder("mistral"))
    assert capfd.readouterr() == ("", "")


# --------------------------------------------------------------------------------------------------------- bundled models


def test_bundled_models_are_folders_with_a_configuration():
    bundled = bundled_models()
    assert set(bundled) >= {"mini-gpt2", "mini-llama"}
    assert all((path / "config.json").is_file() for path in bundled.values())


def test_a_bundled_name_loads(mini_gpt2, mini_llama):
    assert mini_gpt2.cfg.name == "mini-gpt2"
    assert mini_gpt2.cfg.family == "gpt2"
    assert mini_llama.cfg.name == "mini-llama"
    assert mini_llama.cfg.family == "llama"


def test_a_bundled_name_wins_over_the_working_directory(tmp_path, monkeypatch, mini_gpt2):
    (tmp_path / "mini-gpt2").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_model("mini-gpt2").cfg == mini_gpt2.cfg


def test_stories_loads_and_tells_a_story(stories):
    assert stories.cfg.family == "llama"
    assert stories.cfg.n_kv_heads == 4
    assert stories.cfg.tied
    # a trained model: far better than the 6.2 nats of guessing among 512 tokens
    assert stories("Once upon a time, there was a little girl named Lily.", return_type="loss") < 2.5


# ----------------------------------------------------------------------------------------------------------------- errors


def test_a_missing_folder_is_named(tmp_path):
    assert str(tmp_path / "nowhere") in refusal(tmp_path / "nowhere")
    assert "./nowhere" in refusal("./nowhere")
    assert "models/of/mine" in refusal("models/of/mine")


def test_a_folder_without_a_configuration_is_named(tmp_path):
    assert str(tmp_path) in (message := refusal(tmp_path))
    assert "config.json" in message


def test_a_file_is_not_a_model(tmp_path):
    file = tmp_path / "model.bin"
    file.write_bytes(b"?")
    assert "model.bin is a file" in refusal(file)


def test_a_name_that_is_nowhere_is_named():
    assert huggingface_hub.constants.HF_HUB_OFFLINE, "conftest.py keeps the tests off the network"
    start = time.perf_counter()
    message = refusal("no-such-model-anywhere")
    assert time.perf_counter() - start < 5
    assert "'no-such-model-anywhere'" in message
    assert "neither a bundled model" in message
    assert "network" in message


def test_a_near_miss_of_a_bundled_name_lists_them(mini_gpt2):
    assert "mini-gpt2" in refusal("mini-gtp2")


def test_an_unknown_dtype_is_named(tiny_folder):
    assert "'float31'" in refusal(tiny_folder("gpt2"), dtype="float31")


@pytest.mark.parametrize("name", ["nn", "tensor", "int64"])
def test_a_name_in_torch_that_is_no_floating_dtype_is_refused(name, tiny_folder):
    assert name in refusal(tiny_folder("gpt2"), dtype=name)


def test_a_configuration_cut_short_is_named(folder):
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text[: len(text) // 2])
    message = refusal(folder)
    assert str(folder) in message
    assert "JSON" in message


def test_a_configuration_without_a_model_type_is_named(folder):
    (folder / "config.json").write_text("{}")
    assert str(folder) in refusal(folder)


@pytest.mark.parametrize("keep", [0, 5, 0.5, 0.99])
def test_weights_cut_short_are_refused(keep, folder):
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: keep if isinstance(keep, int) else int(keep * len(data))])
    assert str(folder) in refusal(folder)


def test_missing_weights_are_refused(folder):
    (folder / "model.safetensors").unlink()
    assert str(folder) in refusal(folder)


@pytest.mark.parametrize(
    "name", ["transformer.h.1.attn.c_attn.weight", "transformer.ln_f.bias", "transformer.wpe.weight"]
)
def test_a_weight_that_is_missing_is_named(name, folder):
    weights = load_file(folder / "model.safetensors")
    del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    message = refusal(folder)
    assert str(folder) in message
    assert name in message
    assert "1 weight" in message


def test_a_weight_of_another_size_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_inner": 96}))
    assert str(folder) in refusal(folder)


def test_a_weight_that_is_not_finite_is_refused(folder):
    weights = load_file(folder / "model.safetensors")
    weights["transformer.h.1.mlp.c_proj.bias"][3] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "blocks.1.hook_mlp_out" in refusal(folder)


def test_a_folder_without_a_tokenizer_is_refused(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    message = refusal(folder)
    assert str(folder) in message
    assert "okenizer" in message


def test_a_tokenizer_cut_short_is_refused(folder):
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text[: len(text) // 2])
    assert str(folder) in refusal(folder)


def test_the_sentence_is_an_interp_error_for_the_command_line():
    assert issubclass(LoadError, InterpError)
    assert interp.load_model is load_model
