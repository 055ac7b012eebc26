"""Models and files that many tests share. Everything is built once per session and must not be changed by a test."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

# No test needs a network; without one, asking the hub would cost twenty seconds of retries. Read when the hub's library
# is first imported, so this stands before any test is.
os.environ["HF_HUB_OFFLINE"] = "1"

# Kernels run in Triton's interpreter where there is no GPU. Read when triton is first imported, which transformers does.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# The models here are so small that threads cost more than they give, and other jobs may share the machine. Processes that
# tests start compute alike: sums by several threads are rounded otherwise.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"


def _shared(path: str) -> Path:
    """A file or folder beside the clone; nothing of it is part of the project, so a test that needs it skips."""
    found = SHARED / path
    if not found.exists():
        pytest.skip(f"{found} is not there (files of other projects, beside a clone and not part of it)")
    return found


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of other projects' models and task files."""
    return _shared(".")


@pytest.fixture(scope="session")
def stories():
    """stories260k: a small Llama trained on real text, as a canonical transformer."""
    from interp import load_model

    return load_model(_shared("models/stories260k"))


@pytest.fixture(scope="session")
def mini_gpt2():
    from interp import load_model

    return load_model("mini-gpt2")


@pytest.fixture(scope="session")
def mini_llama():
    from interp import load_model

    return load_model("mini-llama")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Callable[..., Path]:
    """`tiny_folder(name, dtype)`: a folder with a tiny random model of that family (see `tests.families`)."""
    from tests.families import save_family

    folders: dict[tuple, Path] = {}

    def folder(name: str, dtype: torch.dtype = torch.float32) -> Path:
        key = name, dtype
        if key not in folders:
            folders[key] = save_family(name, tmp_path_factory.mktemp(f"{name}-") / name, dtype)
        return folders[key]

    return folder


@pytest.fixture(scope="session")
def tiny(tiny_folder) -> Callable:
    """`tiny(name, dtype)`: that model as a canonical `Transformer`. Shared: copy.deepcopy it before changing a weight."""
    from interp import load_model

    models: dict[tuple, object] = {}

    def model(name: str, dtype: torch.dtype = torch.float32):
        key = name, dtype
        if key not in models:
            models[key] = load_model(tiny_folder(name, dtype), dtype=dtype)
        return models[key]

    return model


@pytest.fixture(scope="session")
def gpt2_tokenizer():
    """GPT-2's own byte-pair tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = _shared("models/gpt2_bpe/GPT2")
    vocabulary = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
    merges = [
        tuple(line.split()) for line in (folder / "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:] if line
    ]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end, unk_token=end)


@pytest.fixture(scope="session")
def gpt2_words(gpt2_tokenizer, tmp_path_factory):
    """A random GPT-2 eight channels wide that reads and writes GPT-2's tokens: it can say every task."""
    import transformers

    from interp import load_model
    from tests.families import quiet, randomise

    config = transformers.GPT2Config(n_embd=8, n_layer=2, n_head=2, n_positions=128, vocab_size=50257)
    folder = tmp_path_factory.mktemp("gpt2-words-") / "gpt2-words"
    with quiet(), torch.random.fork_rng(devices=[]):
        randomise(transformers.GPT2LMHeadModel(config)).save_pretrained(folder)
        gpt2_tokenizer.save_pretrained(folder)
    return load_model(folder)
