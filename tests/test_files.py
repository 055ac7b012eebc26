"""A result file is either whole or not there."""

import os
import stat

import pytest

from interp.errors import OptionError
from interp.files import check_writable, write_atomically


def test_text_and_bytes_are_written_as_they_are(tmp_path):
    assert write_atomically(tmp_path / "a.txt", "␣\n").read_bytes() == "␣\n".encode()
    assert write_atomically(str(tmp_path / "a.bin"), b"\0\1").read_bytes() == b"\0\1"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bin", "a.txt"]


def test_an_old_file_is_replaced(tmp_path):
    write_atomically(tmp_path / "a", "old")
    write_atomically(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "new"


def test_a_result_is_as_readable_as_any_new_file(tmp_path):
    (tmp_path / "plain").write_text("")
    path = write_atomically(tmp_path / "a", "x")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["replace", "chmod", "fdopen"])
def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, error, step):
    path = write_atomically(tmp_path / "a.html", "old")

    def fails(*args, **kwargs):
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(os, step, fails)
        with pytest.raises(type(error)):
            write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.html"]


def test_places_that_cannot_be_written_are_said_beforehand(tmp_path):
    assert check_writable(tmp_path / "a.html") == tmp_path / "a.html"
    with pytest.raises(OptionError, match="is a folder"):
        check_writable(tmp_path)
    with pytest.raises(OptionError, match=r"folder .*nowhere does not exist"):
        check_writable(tmp_path / "nowhere" / "a.html")
    with pytest.raises(OptionError):
        write_atomically(tmp_path / "nowhere" / "a.html", "x")
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match="does not exist"):
        check_writable(tmp_path / "file" / "a.html")


def test_a_folder_without_permission_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(OptionError, match="no permission"):
        check_writable(tmp_path / "a.html")
