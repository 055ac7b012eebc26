"""A training run's folder.

Held against: the run that nobody interrupted, bit for bit, wherever a run is stopped and whatever it trains; crashes at every
point of writing a checkpoint.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from interp.errors import OptionError
from interp.features import checkpoints
from interp.features.checkpoints import TrainingFolder, tensorboard, wandb
from interp.features.config import SAEConfig
from interp.features.sae import SAE
from interp.features.shuffle import Position
from interp.features.sources import ArraySource
from interp.features.train import train_saes
from tests.small_pairs import refused

ROWS = torch.randn(300, 8, generator=torch.Generator().manual_seed(0)) + 1
SOURCE = ArraySource({"x": ROWS}, about={"dataset_path": "rows"})
# 300 rows, 100 at a time: three chunks of three batches, so that 40 steps are more than four epochs
RUN = {"steps": 40, "batch_size": 30, "buffer": 100, "lr": 1e-2, "warmup": 0.2, "checkpoint_every": 7, "log_every": 3}
KINDS = {
    "topk": {"k": 1},  # of 64 latents: most are dead
    "batchtopk": {"architecture": "batchtopk", "k": 2},
    "matryoshka": {"architecture": "matryoshka", "k": 1},
    "jumprelu": {"architecture": "jumprelu", "sparsity": 0.5, "bandwidth": 0.5, "threshold_init": 0.5},
    "top-afa": {"architecture": "top-afa"},
    "faithful": {"architecture": "top-afa", "afa": "faithful"},
    "gated": {"architecture": "gated", "sparsity": 0.1},
    "free decoder": {"k": 1, "unit_decoder": False},
    "scaled": {"architecture": "batchtopk", "k": 1, "normalize": "expected_average_only_in"},
}


def config(kind: str) -> SAEConfig:
    return SAEConfig(d_in=8, d_sae=64, hook="x", dead_after=60, **KINDS[kind])


def interrupt(at: int):
    """A logger at which the user loses patience."""

    def log(record: dict) -> None:
        if record["step"] >= at:
            raise KeyboardInterrupt

    return log


def same(one: dict[str, SAE], other: dict[str, SAE]) -> bool:
    states = [{f"{n}/{k}": t for n, sae in saes.items() for k, t in sae.state_dict().items()} for saes in (one, other)]
    return states[0].keys() == states[1].keys() and all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def check_resume(tmp_path: Path, configs: dict[str, SAEConfig], stops: list[int], **options) -> None:
    """Stopped at these steps, one after the other, and started again, a run leaves the very files of one that was not."""
    whole = train_saes(SOURCE, configs, folder=tmp_path / "whole", **RUN, **options)
    for stop in stops:
        with pytest.raises(KeyboardInterrupt):
            train_saes(SOURCE, configs, folder=tmp_path / "parts", loggers=[interrupt(stop)], **RUN, **options)
    parts = train_saes(SOURCE, configs, folder=tmp_path / "parts", **RUN, **options)
    assert same(whole, parts)
    expected, found = files(tmp_path / "whole"), files(tmp_path / "parts")
    assert expected.keys() == found.keys()
    assert [name for name in expected if expected[name] != found[name]] == []


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


# ------------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_run_ends_as_if_it_had_not_been(tmp_path, kind):
    check_resume(tmp_path, {"a": config(kind)}, [24])


@pytest.mark.parametrize(
    "stops",
    [[3], [21], [40], [3, 9, 21, 21, 36]],
    ids=["before the first checkpoint", "where one is due", "at the last step", "five times"],
)
def test_a_run_may_be_interrupted_anywhere_and_often(tmp_path, stops):
    """Before the first checkpoint (7), between two, where one is due (21), and at the last step."""
    check_resume(tmp_path, {"a": config("topk"), "b": config("batchtopk")}, stops)


def test_with_every_schedule_and_a_narrow_encoder(tmp_path):
    options = {"anneal_k": 0.8, "sparsity_warmup": 0.9, "encoder_dtype": "bfloat16", "clip": 0.5, "seed": 5}
    check_resume(tmp_path, {"a": config("topk"), "b": config("jumprelu"), "c": config("matryoshka")}, [24], **options)


def test_dead_latents_matter_in_these_runs(tmp_path):
    """Else the tests above would say nothing about AuxK."""
    saes = {}
    for weight in (1 / 32, 0.0):
        asked = SAEConfig(d_in=8, d_sae=64, hook="x", dead_after=60, k=1, aux_weight=weight)
        saes[weight] = train_saes(SOURCE, {"a": asked}, folder=tmp_path / str(weight), **RUN)
        assert max(record["dead"] for record in log_of(tmp_path / str(weight))) > 0.1
    assert not same(*saes.values())


def test_a_finished_run_is_not_run_again(tmp_path):
    first = train_saes(SOURCE, {"a": config("topk")}, folder=tmp_path / "run", **RUN)
    before = files(tmp_path / "run")
    heard = []
    again = train_saes(SOURCE, {"a": config("topk")}, folder=tmp_path / "run", loggers=[heard.append], **RUN)
    assert same(first, again)
    assert heard == []
    assert files(tmp_path / "run") == before


@pytest.mark.parametrize("name", ["checkpoint", "log.jsonl", "a/b", "..", ""])
def test_names_that_are_no_folders_of_their_own_are_refused(tmp_path, name):
    with refused(OptionError, f"an SAE cannot be called '{name}' in a training run's folder"):
        train_saes(SOURCE, {name: config("topk")}, folder=tmp_path / "run", **RUN)
    assert not (tmp_path / "run").exists()
    assert name in train_saes(SOURCE, {name: config("topk")}, **RUN | {"steps": 1})


def test_what_is_saved_is_what_is_returned(tmp_path):
    trained = train_saes(SOURCE, {kind: config(kind) for kind in ("topk", "scaled")}, folder=tmp_path, **RUN)
    loaded = {name: SAE.load(tmp_path / name) for name in trained}
    assert same(trained, loaded)
    assert loaded["topk"].metadata["dataset_path"] == "rows"


# ---------------------------------------------------------------------------------------------------------------- log


def test_the_log_has_each_record_once(tmp_path):
    configs = {"a": config("topk"), "b": config("batchtopk")}
    for stop in (3, 12, 24):
        with pytest.raises(KeyboardInterrupt):
            train_saes(SOURCE, configs, folder=tmp_path, loggers=[interrupt(stop)], **RUN)
    train_saes(SOURCE, configs, folder=tmp_path, **RUN)
    records = log_of(tmp_path)
    assert [(r["step"], r["sae"]) for r in records] == [(s, n) for s in [*range(3, 40, 3), 40] for n in "ab"]
    assert all(r["tokens"] == 30 * r["step"] for r in records)
    assert records[0].keys() == {"step", "tokens", "sae", "lr", "loss", "l0", "fvu", "dead"}


def test_a_half_written_line_goes(tmp_path):
    store = TrainingFolder(tmp_path / "run", {})
    log = store.logger(0)
    for step in range(1, 6):
        log({"step": step, "loss": 0.5})
    path = tmp_path / "run" / "log.jsonl"
    path.write_text(path.read_text(encoding="utf-8") + '{"step": 4, "lo', encoding="utf-8")
    store.logger(3)({"step": 4, "loss": 0.25})
    assert [(r["step"], r["loss"]) for r in log_of(tmp_path / "run")] == [(1, 0.5), (2, 0.5), (3, 0.5), (4, 0.25)]


# ------------------------------------------------------------------------------------------------------------ crashes


def tensors(step: int) -> dict[str, dict[str, torch.Tensor]]:
    return {"a": {"sae.W": torch.full((2, 3), float(step)).T, "dead": torch.zeros(0, dtype=torch.int64)},
            "b": {"scale": torch.tensor(step / 3, dtype=torch.float64)}}  # fmt: skip


def check_latest(store: TrainingFolder, step: int) -> None:
    found = store.latest()
    assert (found.step, found.position) == (step, Position(1, step, 5))
    for name, named in tensors(step).items():
        assert found.tensors[name].keys() == named.keys()
        assert all(torch.equal(found.tensors[name][key], tensor) for key, tensor in named.items())


def test_a_checkpoint_comes_back(tmp_path):
    store = TrainingFolder(tmp_path / "run", {"a": (1, 2)})
    assert store.latest() is None
    for step in (1, 2):
        store.save(step, Position(1, step, 5), tensors(step))
        check_latest(TrainingFolder(tmp_path / "run", {"a": [1, 2]}), step)
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"run.json", "checkpoint"}


@pytest.mark.parametrize("where", ["tensors", "state", "aside", "in place"])
def test_a_crash_while_saving_costs_only_that_checkpoint(tmp_path, monkeypatch, where):
    store = TrainingFolder(tmp_path / "run", {})
    store.save(1, Position(1, 1, 5), tensors(1))
    rename = Path.rename

    def crash(*args) -> None:
        raise KeyboardInterrupt

    def crash_at(path: Path, target: Path):
        if target.name == {"aside": "checkpoint.old", "in place": "checkpoint"}[where]:
            raise KeyboardInterrupt
        return rename(path, target)

    for step in (2, 3):  # the second time on what the first has left
        with monkeypatch.context() as patch:
            if where == "tensors":
                patch.setattr(checkpoints, "save_file", crash)
            elif where == "state":
                patch.setattr(checkpoints, "write_atomically", crash)
            else:
                patch.setattr(Path, "rename", crash_at)
            with pytest.raises(KeyboardInterrupt):
                store.save(step, Position(1, step, 5), tensors(step))
        check_latest(store, 1)
    store.save(4, Position(1, 4, 5), tensors(4))
    check_latest(store, 4)
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"run.json", "checkpoint"}


def test_a_damaged_new_checkpoint_is_ignored(tmp_path):
    configs = {"a": config("topk")}
    whole = train_saes(SOURCE, configs, **RUN)
    with pytest.raises(KeyboardInterrupt):
        train_saes(SOURCE, configs, folder=tmp_path, loggers=[interrupt(24)], **RUN)
    damaged = tmp_path / "checkpoint.new"
    damaged.mkdir()
    (damaged / "state.safetensors").write_bytes(b"half a")
    (damaged / "state.json").write_text('{"step": 22, ', encoding="utf-8")
    assert same(whole, train_saes(SOURCE, configs, folder=tmp_path, **RUN))
    assert not damaged.exists()


# ----------------------------------------------------------------------------------------------------- other folders


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"steps": 41}, "training.steps was 40, and is 41 now"),
        ({"seed": 1}, "training.seed was 0, and is 1 now"),
        ({"configs": {"a": config("batchtopk")}}, "configs.a.architecture was topk, and is batchtopk now"),
        ({"configs": {"b": config("topk")}}, "configs.a was .*, and is None now"),
        ({"source": ArraySource({"x": ROWS}, about={"dataset_path": "other"})}, "source.dataset_path was rows, and is other now"),
        ({"source": ArraySource({"x": ROWS[1:]}, SOURCE.about)}, "source.n_sequences was 300, and is 299 now"),
    ],
    ids=["steps", "seed", "config", "names", "data", "size"],
)  # fmt: skip
def test_another_runs_folder_is_refused(tmp_path, changed, says):
    train_saes(SOURCE, {"a": config("topk")}, folder=tmp_path, **RUN)
    before = files(tmp_path)
    asked = {"source": SOURCE, "configs": {"a": config("topk")}, **RUN} | changed
    with refused(OptionError, f"holds another run: {says}; take another folder, or the same options"):
        train_saes(folder=tmp_path, **asked)
    assert files(tmp_path) == before


def test_what_is_no_run_of_ours_is_left_alone(tmp_path):
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    with refused(OptionError, f"{tmp_path / 'file'} is a file, and a training run needs a folder"):
        train_saes(SOURCE, {"a": config("topk")}, folder=tmp_path / "file", **RUN)
    with refused(OptionError, f"{tmp_path} is not empty and holds no training run"):
        train_saes(SOURCE, {"a": config("topk")}, folder=tmp_path, **RUN)
    assert files(tmp_path) == {"file": b"mine"}
    empty = tmp_path / "deep" / "new"
    train_saes(SOURCE, {"a": config("topk")}, folder=empty, **RUN | {"steps": 1})
    assert {p.name for p in empty.iterdir()} == {"run.json", "log.jsonl", "checkpoint", "a"}


# ------------------------------------------------------------------------------------------------------------ loggers


@pytest.mark.parametrize(
    ("module", "logger", "arguments"), [("torch.utils.tensorboard", tensorboard, ["run"]), ("wandb", wandb, [])],
    ids=["tensorboard", "wandb"],
)  # fmt: skip
def test_a_logger_whose_package_is_missing_says_so(monkeypatch, module, logger, arguments):
    monkeypatch.setitem(sys.modules, module, None)
    with refused(OptionError, f"needs the package {logger.__name__}, which is not installed"):
        logger(*arguments)


def test_loggers_name_each_number_by_its_sae(monkeypatch, tmp_path):
    heard: list[tuple] = []
    writer = SimpleNamespace(add_scalar=lambda *args: heard.append(args), flush=lambda: None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=lambda folder: writer))
    run = SimpleNamespace(log=lambda values, step: heard.append((values, step)))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda project: run))
    for log in (tensorboard(tmp_path), wandb(project="p")):
        log({"step": 3, "sae": "a", "loss": 0.5})
    assert heard == [("a/loss", 0.5, 3), ({"a/loss": 0.5}, 3)]
