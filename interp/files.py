"""Writing results so that a file is either whole or not there; and amounts of memory as people write them."""

import os
import re
import tempfile
from pathlib import Path

from interp.errors import OptionError


def check_writable(path: str | Path) -> Path:
    """The path, if a file can be written there; `OptionError` otherwise. Called before long work, not after it."""
    path = Path(path)
    if path.is_dir():
        raise OptionError(f"{path} is a folder, not a file to write to")
    if not path.parent.is_dir():
        raise OptionError(f"the folder {path.parent} does not exist")
    if not os.access(path.parent, os.W_OK):
        raise OptionError(f"no permission to write to the folder {path.parent}")
    return path


def write_atomically(path: str | Path, content: str | bytes) -> Path:
    """Write to a temporary name beside the file, then rename: an interruption leaves no half-written file."""
    path = check_writable(path)
    data = content.encode() if isinstance(content, str) else content
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp's files are private; a report is not
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def n_bytes(text: str) -> int:
    """800M, 4G or plain bytes as a number of bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if match is None or not float(match[1]):
        raise OptionError(f"{text!r} is not an amount of memory: write 800M or 4G")
    return int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " "))
