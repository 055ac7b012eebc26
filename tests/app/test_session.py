"""Session files: what goes out comes in again, and what is not one of ours changes nothing."""

import json
from copy import deepcopy

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("streamlit", reason="the dashboard needs the extra [app]")

from streamlit.testing.v1 import AppTest

from app.behaviour import OWN
from app.session import MAX_BYTES, annotated, checked, read_session
from interp.errors import InterpError, LoadError, OptionError, SiteError, TaskError
from tests.small_pairs import refused

SESSION = {
    "format": "interp session", "version": 1,
    "behaviour": {"model": "mini-gpt2", "task": "ioi", "n": 4, "seed": 3, "clean": "", "corrupt": "", "answer": "", "wrong": ""},
    "selection": {"primary": "a1.h2", "pinned": "resid_pre@2@7"}, "pins": ["a1.h2", "m0"],
    "groups": {"movers": ["a3.h1", "a2.h7"], "<b>ünïcode</b>": ["input"]}, "notes": {"m0": "<script>alert(1)</script>\nline"},
    "circuit": {"share": 0.9, "chosen": ["a1.h2", "input->m0"], "method": "eap", "rules": "relp", "metric": "logit_diff",
                "ablation": "zero"},
}  # fmt: skip


def with_change(path: str, value) -> dict:
    content, keys = deepcopy(SESSION), path.split(".")
    part = content
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = value
    return content


def opened_and_saved(content: str) -> None:
    """A page of its own that opens a session and saves it again."""
    import json

    import streamlit as st

    from app.session import open_session, save_session

    open_session(json.loads(content))
    st.json(save_session())


def test_a_session_comes_back_as_it_was():
    at = AppTest.from_function(opened_and_saved, args=(json.dumps(SESSION),), default_timeout=60).run()
    assert not at.exception, at.exception[0].message
    assert json.loads(at.json[0].value) == SESSION


def test_opening_sets_the_form_and_the_address():
    at = AppTest.from_function(opened_and_saved, args=(json.dumps(SESSION),), default_timeout=60).run()
    assert at.session_state["form_n"] == 4
    assert at.session_state["edge_rules"] == "relp"
    assert at.query_params["at"] == "a1.h2"
    assert at.query_params["n"] == "4"


def test_reading_gives_the_content():
    assert read_session(json.dumps(SESSION).encode()) == SESSION
    assert checked(SESSION)[1] == SESSION["circuit"]


@pytest.mark.parametrize(
    ("data", "says"),
    [(b"", "not valid JSON"), (b"\x80\x04pickle", "not valid JSON"), (b"[" * 200_000, "not valid JSON"),
     (b"[1]", "not a mapping"), (b" " * (MAX_BYTES + 1), "at most 1,000,000 bytes")],
    ids=["empty", "pickle", "deep", "list", "large"],
)  # fmt: skip
def test_files_that_are_no_session(data, says):
    with refused(OptionError, says):
        read_session(data)


@pytest.mark.parametrize(
    ("path", "value", "error", "says"),
    [
        ("format", "other", OptionError, "does not say format"),
        ("version", 2, OptionError, "of version 2"),
        ("pins", {}, OptionError, "not a list"),
        ("pins", ["a9.h0"], SiteError, "a9.h0"),
        ("pins", ["<b>"], SiteError, "not a node"),
        ("pins", ["m0"] * 1001, OptionError, "at most 1,000"),
        ("notes", {"m0": 3}, OptionError, "not a text"),
        ("notes", {"m0": "x" * 2001}, OptionError, "at most 2,000"),
        ("groups", {"x": "m0"}, OptionError, "not a list"),
        ("behaviour.model", "../../etc", LoadError, "not a bundled model"),
        ("behaviour.task", "none", TaskError, "not a task"),
        ("behaviour.task", OWN, TaskError, "type a clean prompt"),
        ("behaviour.n", 10_000, TaskError, "1 to 64"),
        ("behaviour.n", "4", TaskError, "not a int"),
        ("behaviour.seed", -1, TaskError, "begin at 0"),
        ("behaviour.extra", 1, TaskError, "no behaviour has"),
        ("selection.primary", "nowhere", SiteError, "not a node"),
        ("circuit.share", float("nan"), OptionError, "share of influence"),
        ("circuit.share", True, OptionError, "share of influence"),
        ("circuit.rules", "none", OptionError, "rules"),
        ("circuit.chosen", ["m0->input"], SiteError, "no edge"),
        ("circuit.chosen", ["m0.n1"], SiteError, "whole MLPs"),
    ],
)
def test_what_cannot_be_used_is_named(path, value, error, says):
    with refused(error, says):
        checked(with_change(path, value))


@pytest.mark.parametrize("name", list(SESSION))
def test_every_part_has_to_be_there(name):
    with pytest.raises(InterpError):
        checked({key: value for key, value in SESSION.items() if key != name})


NODES = st.sampled_from(["a0.h1", "m2", "input", "a3.h7"])


@given(node=NODES, pinned=st.booleans(), group=st.sampled_from(["", "x", " y "]), note=st.sampled_from(["", "n"]),
       others=st.lists(NODES, unique=True))  # fmt: skip
def test_marks_say_what_was_said_last(node, pinned, group, note, others):
    mine = {"pins": others, "groups": {"x": others} if others else {}, "notes": dict.fromkeys(others, "old")}
    new = annotated(mine, node, pinned=pinned, group=group, note=note)
    assert (node in new["pins"], new["notes"].get(node, "")) == (pinned, note)
    assert [name for name, nodes in new["groups"].items() if node in nodes] == (
        [group.strip()] if group.strip() else []
    )
    assert [n for n in new["pins"] if n != node] == [n for n in others if n != node]
    assert all(new["groups"].values())
    assert annotated(new, node, pinned=pinned, group=group, note=note) == new
