"""`interp sae`: training, judging and showing from the command line, and what bad input gets."""

import json

import pandas as pd
import pytest
import torch

from interp import SAE, SAEConfig
from interp.bundled import bundled_text
from interp.cli import main

HOOK = "blocks.1.hook_resid_post"


def run(*arguments) -> int:
    return main([str(a) for a in ("sae", *arguments)])


def error(capsys) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("interp: warning: ")]
    assert len(lines) == 1, lines
    assert lines[0].startswith("interp: error: ")
    return lines[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small autoencoder of mini-gpt2, trained by the command."""
    folder = tmp_path_factory.mktemp("sae-") / "run"
    assert run("train", "--hook", HOOK, "--out", folder, "--d-sae", 256, "--k", 8, "--steps", 60, "--batch-size", 256,
               "--n-texts", 150, "--lr", 2e-3, "--quiet") == 0  # fmt: skip
    return folder


def test_training_leaves_a_run_and_an_autoencoder(trained):
    assert {p.name for p in trained.iterdir()} == {"run.json", "log.jsonl", "checkpoint", "sae"}
    sae = SAE.load(trained / "sae")
    assert (sae.config.hook, sae.config.k, sae.config.d_sae) == (HOOK, 8, 256)
    assert sae.metadata["model_name"] == "mini-gpt2"
    assert 0 < sae.metadata["fvu"] < 1
    records = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [50, 60]
    assert {"loss", "l0", "fvu", "dead", "lr", "tokens"} <= records[0].keys()


def test_the_same_command_again_changes_nothing(trained, capsys):
    before = (trained / "sae" / "sae_weights.safetensors").read_bytes()
    assert run("train", "--hook", HOOK, "--out", trained, "--d-sae", 256, "--k", 8, "--steps", 60, "--batch-size", 256,
               "--n-texts", 150, "--lr", 2e-3, "--quiet") == 0  # fmt: skip
    assert (trained / "sae" / "sae_weights.safetensors").read_bytes() == before
    assert run("train", "--hook", HOOK, "--out", trained, "--d-sae", 256, "--k", 9, "--steps", 60, "--quiet") == 2
    assert "holds another run" in error(capsys)


def test_judging(trained, tmp_path, capsys):
    figures, zf = tmp_path / "figures.json", tmp_path / "zf.html"
    assert run("eval", trained / "sae", "--n-texts", 20, "--out", figures, "--zf", zf, "--quiet") == 0
    found = json.loads(figures.read_text())
    assert found["l0"] == pytest.approx(8, abs=0.5)
    assert zf.stat().st_size > 100_000
    assert "FVU" in capsys.readouterr().out


def test_top_afa_may_choose_instead(trained, tmp_path):
    figures = tmp_path / "figures.json"
    assert run("eval", trained / "sae", "--n-texts", 10, "--select", "afa", "--out", figures, "--quiet") == 0
    assert abs(json.loads(figures.read_text())["l0"] - 8) > 0.01


def test_showing(trained, tmp_path, capsys):
    table = tmp_path / "contexts.parquet"
    assert run("show", trained / "sae", "--n-texts", 40, "--n", 3, "--out", table, "--quiet") == 0
    out = capsys.readouterr().out
    assert out.count("fires on") == 8
    assert "top tokens" in out
    assert pd.read_parquet(table).groupby("latent").size().max() == 3
    latent = int(pd.read_parquet(table)["latent"].iloc[0])
    assert run("show", trained / "sae", "--latents", latent, "--n-texts", 40, "--quiet") == 0
    assert f"latent {latent}: fires on" in capsys.readouterr().out


def test_a_transcoder(tmp_path, capsys):
    hooks = ("--hook", "blocks.1.ln2.hook_normalized", "--target-hook", "blocks.1.hook_mlp_out")
    assert run("train", *hooks, "--skip", "--out", tmp_path / "t", "--d-sae", 128, "--steps", 20, "--n-texts", 60,
               "--batch-size", 128, "--quiet") == 0  # fmt: skip
    sae = SAE.load(tmp_path / "t" / "sae")
    assert sae.config.transcoder
    assert sae.W_skip.shape == (128, 128)
    assert run("show", tmp_path / "t" / "sae", "--n-texts", 10, "--n", 1, "--quiet") == 0
    assert "top tokens" in capsys.readouterr().out
    zf = tmp_path / "zf.html"
    assert run("eval", tmp_path / "t" / "sae", "--n-texts", 10, "--zf", zf, "--quiet") == 0
    assert zf.stat().st_size > 100_000


def test_bundled_autoencoders_are_listed(capsys):
    assert run("list") == 0
    assert "mini-gpt2/resid_post2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--architecture", "topp"), "did you mean 'topk'"),
        (("--hook", "blocks.9.hook_resid_post"), "no hook point 'blocks.9.hook_resid_post'"),
        (("--text", "missing.txt"), "there is no file missing.txt"),
        (("--n-texts", "0"), "cannot read 0 texts"),
        (("--architecture", "jumprelu"), "give its coefficient with --sparsity"),
        (("--architecture", "gated", "--k", "4"), "--k is not for gated"),
        (("--architecture", "top-afa", "--afa", "faithful", "--k", "4"), "--k is not for top-afa"),
        (("--k", "5000"), "d_sae has only 1024"),
        (("--steps", "0"), "steps must be at least 1"),
        (("--lr", "-1"), "lr must be positive"),
        (("--held-out", "1.0"), "too few"),
        (("--max-memory", "10M"), "there is 10 MiB"),
        (("--max-memory", "much"), "not an amount of memory"),
    ],
    ids=[
        "architecture",
        "hook",
        "file",
        "no-texts",
        "no-penalty",
        "no-k",
        "no-k-published",
        "k",
        "steps",
        "lr",
        "held-out",
        "memory",
        "amount",
    ],
)
def test_bad_options_of_training(arguments, says, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {"--hook": HOOK, "--n-texts": "20", **dict(zip(arguments[::2], arguments[1::2], strict=True))}
    words = [word for pair in given.items() for word in pair]
    assert run("train", *words, "--out", tmp_path / "out", "--quiet") == 2
    assert says in error(capsys)
    assert not (tmp_path / "out" / "sae").exists()


def test_a_file_where_the_run_belongs(tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    assert run("train", "--hook", HOOK, "--out", tmp_path / "out", "--n-texts", 20, "--quiet") == 2
    assert "is a file" in error(capsys)
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("eval", "nowhere"), "nowhere"),
        (("show", "nowhere"), "nowhere"),
    ],
    ids=["eval", "show"],
)
def test_an_autoencoder_that_is_not_there(arguments, says, capsys):
    assert run(*arguments) == 2
    assert says in error(capsys)


def test_bad_options_of_showing(trained, tmp_path, capsys):
    for words, says in (
        (("--latents", 999), "latents 0 to 255, not 999"),
        (("--n", 0), "cannot show 0 contexts"),
        (("--out", tmp_path / "x.csv"), ".parquet"),
        (("--text", tmp_path / "none.txt"), "there is no file"),
    ):
        assert run("show", trained / "sae", "--n-texts", 10, "--quiet", *words) == 2
        assert says in error(capsys)


@pytest.mark.filterwarnings("always")
def test_another_model_is_warned_about(trained, capsys):
    assert run("eval", trained / "sae", "--model", "mini-llama", "--n-texts", 10, "--quiet") == 0
    assert "was trained on mini-gpt2" in capsys.readouterr().err


def test_an_interrupted_run_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    from interp.features import train

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(train.Learner, "step", interrupt)
    with pytest.raises(SystemExit) as stopped:
        run("train", "--hook", HOOK, "--out", tmp_path / "out", "--n-texts", 60, "--steps", 10, "--quiet")
    assert stopped.value.code == 130
    assert "goes on" in capsys.readouterr().err


def test_a_model_without_bundled_text_needs_some(tiny_folder, tmp_path, capsys):
    assert run("train", "--model", tiny_folder("gpt2"), "--hook", HOOK, "--out", tmp_path / "o", "--quiet") == 2
    assert "give a file with the option text" in error(capsys)


def test_an_autoencoder_without_a_model_needs_one(tmp_path, capsys):
    SAE(SAEConfig(d_in=128, d_sae=16, k=2, hook=HOOK)).save(tmp_path / "sae")
    assert run("eval", tmp_path / "sae", "--quiet") == 2
    assert "give one with --model" in error(capsys)


def test_the_bundled_text_is_the_models_own(mini_gpt2):
    from interp.features.sources import Corpus

    corpus = Corpus.from_file(mini_gpt2, bundled_text())
    unknown = (corpus.tokens == mini_gpt2.tokenizer.unk_token_id).float().mean()
    assert unknown < 0.002
    with torch.no_grad():
        loss = mini_gpt2(corpus.tokens[:16, :32], return_type="loss")
    assert loss < 3.0
