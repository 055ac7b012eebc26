"""`interp app`: refuses in one sentence what cannot work, starts a server for this machine alone, and leaves none behind."""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from interp import app_cli
from interp.app_cli import App
from interp.cli import main
from interp.errors import OptionError
from tests.small_pairs import refused


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_it_listens_to_this_machine_and_tells_nobody():
    command = " ".join(App().command())
    assert "--server.address 127.0.0.1" in command
    assert "--browser.gatherUsageStats false" in command
    assert "--server.port 8501" in command
    assert Path(App().command()[4]).name == "serve.py", "which serves main.py, warm"


@pytest.mark.parametrize(
    ("address", "url"),
    [("127.0.0.1", "http://127.0.0.1:8501"), ("0.0.0.0", "http://127.0.0.1:8501"), ("::1", "http://[::1]:8501")],
    ids=["here", "everywhere", "IPv6"],
)
def test_the_address_to_open(address, url):
    assert App(address=address).url == url


def test_folders_reach_the_dashboard_as_absolute_paths(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path)
    environment = App(folders=(Path("a"), tmp_path), runs=Path("kept")).environment()
    assert environment["INTERP_APP_FOLDERS"].split(os.pathsep) == [str(tmp_path / "a"), str(tmp_path)]
    assert environment["INTERP_APP_RUNS"] == str(tmp_path / "kept")
    assert App().environment()["INTERP_APP_FOLDERS"] == "", "none by default, whatever the shell says"


def test_without_streamlit_it_names_the_extra(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["app"]) == 2
    assert (
        capsys.readouterr().err == "interp: error: the dashboard needs Streamlit: pip install interp-workbench[app]\n"
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--port", "0"], "0 is not a port"),
        (["--folders", "no/such/folder"], "there is no folder no/such/folder"),
        (["--runs", str(Path(__file__))], "is a file, and runs are kept in a folder"),
        (["--address", "203.0.113.7", "--port", "8599"], "cannot listen on 203.0.113.7:8599"),
    ],
    ids=["port", "folder", "runs", "address"],
)
def test_what_cannot_work_is_refused_in_a_sentence(arguments, says, capsys):
    pytest.importorskip("streamlit", reason="the dashboard needs the extra [app]")
    assert main(["app", "--no-browser", *arguments]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1


def test_a_taken_port_is_refused():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with refused(OptionError, "choose another --port"):
            app_cli._check_free("127.0.0.1", taken.getsockname()[1])


def test_a_server_that_ends_at_once_is_an_error(monkeypatch, capfd):
    monkeypatch.setattr(App, "command", lambda self: [sys.executable, "-c", "raise SystemExit('no room')"])
    with refused(OptionError, "ended with status 1"):
        App(port=free_port(), no_browser=True).run()
    assert "no room" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_it_starts_answers_and_ends_with_its_server(name):
    pytest.importorskip("streamlit", reason="the dashboard needs the extra [app]")
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "interp.cli", "app", "--port", str(port), "--no-browser"], stdout=subprocess.PIPE, text=True,
        # a test run in the background ignores Ctrl-C, and so would what it starts
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        assert process.stdout.readline() == f"interp: dashboard at http://127.0.0.1:{port} (Ctrl-C ends it)\n"
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/_stcore/health", timeout=5) as answer:
            assert answer.read() == b"ok"
        process.send_signal(getattr(signal, name))
        rest, _ = process.communicate(timeout=20)
        assert "dashboard ended" in rest
        assert process.returncode == 0
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0, "the server is gone too"
    finally:
        process.kill()
        process.communicate()
