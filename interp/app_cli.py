"""`interp app`: the dashboard, on this machine and for this machine's users.

    interp app                                        http://127.0.0.1:8501, opened in a browser
    interp app --folders models saes --port 8600      local models below these folders may be opened too

It is a Streamlit process of its own; this one waits until it answers, says where, and ends it with Ctrl-C.
"""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import webbrowser
from dataclasses import dataclass
from pathlib import Path

_PATIENCE = 60.0  # seconds until a server that does not answer is given up


@dataclass(frozen=True, kw_only=True)
class App:
    """Explore a model in the browser: prompts, patching maps, circuits, features, neurons, steering, runs."""

    port: int = 8501
    """Port to listen on."""
    address: str = "127.0.0.1"
    """Address to listen on. The default is for this machine alone; there is no password."""
    folders: tuple[Path, ...] = ()
    """Folders below which local models, autoencoders and results may be opened."""
    runs: Path | None = None
    """Folder of jobs and their results (default: interp-runs in the working folder)."""
    no_browser: bool = False
    """Print the address, open nothing."""

    def run(self) -> None:
        from interp.errors import OptionError

        command, environment = self.command(), self.environment()
        _check_free(self.address, self.port)
        server = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # either signal ends both processes
        try:
            _wait(server, self.url)
            print(f"interp: dashboard at {self.url} (Ctrl-C ends it)", flush=True)
            if not self.no_browser:
                webbrowser.open(self.url)
            if code := server.wait():
                raise OptionError(f"the dashboard's server ended with status {code}; what it printed is above")
        except KeyboardInterrupt:
            print("\ninterp: dashboard ended; jobs go on")
        finally:
            _end(server)
            signal.signal(signal.SIGTERM, before)

    @property
    def url(self) -> str:
        """Where a browser on this machine finds it."""
        host = "127.0.0.1" if self.address in ("0.0.0.0", "::", "") else self.address
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    def command(self) -> list[str]:
        """The server's command line. Raises `OptionError` if Streamlit or the dashboard is not installed, or for a wrong port."""
        from interp.errors import OptionError

        if not 1 <= self.port <= 65535:
            raise OptionError(f"{self.port} is not a port: those are 1 to 65535")
        if importlib.util.find_spec("streamlit") is None:
            raise OptionError("the dashboard needs Streamlit: pip install interp-workbench[app]")
        # headless: the server would ask for an e-mail address, and would open the browser before it can answer
        # viewer: no button that puts the app on somebody else's machine
        return [
            sys.executable, "-m", "streamlit", "run", str(_server()), "--server.port", str(self.port), "--server.address",
            self.address, "--server.headless", "true", "--browser.gatherUsageStats", "false", "--server.fileWatcherType", "none",
            "--client.toolbarMode", "viewer",
        ]  # fmt: skip

    def environment(self) -> dict[str, str]:
        """The server's environment. Raises `OptionError` naming a folder that does not exist."""
        from interp.errors import OptionError

        for folder in self.folders:
            if not folder.is_dir():
                raise OptionError(f"there is no folder {folder}")
        if self.runs is not None and self.runs.exists() and not self.runs.is_dir():
            raise OptionError(f"{self.runs} is a file, and runs are kept in a folder")
        given = {"INTERP_APP_FOLDERS": os.pathsep.join(str(folder.resolve()) for folder in self.folders)}
        if self.runs is not None:
            given["INTERP_APP_RUNS"] = str(self.runs.resolve())
        return {**os.environ, **given}


def _server() -> Path:
    """The file that serves the dashboard: beside the package in a clone, inside it in an installed wheel."""
    from interp.errors import OptionError

    package = Path(__file__).resolve().parent
    for folder in (package / "bundled" / "app", package.parent / "app"):
        if (folder / "serve.py").is_file():
            return folder / "serve.py"
    raise OptionError(f"the dashboard is not installed here: there is no {package.parent / 'app' / 'serve.py'}")


def _check_free(address: str, port: int) -> None:
    """Raise if nobody could listen there."""
    from interp.errors import OptionError

    try:
        family, kind, _, _, place = socket.getaddrinfo(address or None, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror:
        raise OptionError(f"{address!r} is not an address of this machine") from None
    with socket.socket(family, kind) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a server that has just ended is no hindrance
        try:
            probe.bind(place)
        except OSError as error:
            raise OptionError(f"cannot listen on {address}:{port} ({error.strerror}): choose another --port") from error


def _wait(server: subprocess.Popen, url: str) -> None:
    """Until the server answers. Raises `OptionError` if it ends first, or never does."""
    from interp.errors import OptionError

    # a proxy of the environment does not know this machine's own address
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        if (code := server.poll()) is not None:
            raise OptionError(f"the dashboard's server ended with status {code}; what it printed is above")
        try:
            with opener.open(f"{url}/_stcore/health", timeout=1):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise OptionError(f"the dashboard did not answer at {url} within {_PATIENCE:.0f} seconds")


def _end(server: subprocess.Popen) -> None:
    """Ask the server to end; make it, after five seconds."""
    if server.poll() is not None:
        return
    server.terminate()
    try:
        server.wait(5)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
