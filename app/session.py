"""A session as a JSON file: what was looked at, selected, pinned, grouped and noted, so that the view travels with its circuit.

    {"format": "interp session", "version": 1, "behaviour": {...}, "selection": {"primary", "pinned"},
     "pins": [node], "groups": {name: [node]}, "notes": {node: text},
     "circuit": {"share", "chosen", "method", "rules", "metric", "ablation"}}

A file is data of strangers: it is checked to the last field before anything of it is used, and it can name no model or folder
that this dashboard would not open anyway.
"""

import json
from dataclasses import asdict, fields
from typing import Any

import streamlit as st

from app.behaviour import Behaviour
from app.circuits import METHODS, QUICK_ABLATIONS
from app.locked import allowed, locked_model
from app.selection import parse_cell, pin, select, selection
from app.sidebar import behaviour, set_behaviour
from interp import METRICS
from interp.circuits.graph import Graph, select_edges
from interp.errors import OptionError, SiteError, TaskError, one_of
from interp.rules import RULES
from interp.sites import parse_node

KEY = "notes"
FORMAT, VERSION = "interp session", 1
MAX_BYTES, MAX_NAMES, MAX_TEXT = 1_000_000, 1_000, 2_000
CHOICES = {"method": METHODS, "rules": tuple(RULES), "metric": tuple(METRICS), "ablation": QUICK_ABLATIONS}
WIDGETS = {"rules": "edge_rules"}  # where a widget's key is not the name: the Patch page has other rules to choose from
FIELDS = {"behaviour": dict, "selection": dict, "pins": list, "groups": dict, "notes": dict, "circuit": dict}


def marks() -> dict[str, Any]:
    """This session's pins, groups and notes: {"pins": [node], "groups": {name: [node]}, "notes": {node: text}}."""
    return st.session_state.setdefault(KEY, {"pins": [], "groups": {}, "notes": {}})


def annotated(mine: dict[str, Any], node: str, *, pinned: bool, group: str, note: str) -> dict[str, Any]:
    """Those marks with what is now said of a node. An empty group or note takes it out; a group without nodes goes."""
    group, note = group.strip(), note.strip()
    groups = {name: [n for n in nodes if n != node] for name, nodes in mine["groups"].items()}
    if group:
        groups[group] = [*groups.get(group, []), node]
    notes = {n: text for n, text in mine["notes"].items() if n != node} | ({node: note} if note else {})
    pins = [n for n in mine["pins"] if n != node] + ([node] if pinned else [])
    return {"pins": pins, "groups": {name: nodes for name, nodes in groups.items() if nodes}, "notes": notes}


def save_session() -> dict[str, Any]:
    """Everything that makes the view, as plain values for JSON."""
    state, at = st.session_state, selection()
    page = {"share": state.get("share"), "chosen": list(state.get("chosen") or [])}
    page |= {name: state.get(WIDGETS.get(name, name)) for name in CHOICES}
    return {
        "format": FORMAT, "version": VERSION, "behaviour": asdict(behaviour()),
        "selection": {"primary": at.primary, "pinned": at.pinned}, **json.loads(json.dumps(marks())),
        "circuit": {name: value for name, value in page.items() if value is not None},
    }  # fmt: skip


def open_session(content: dict[str, Any]) -> None:
    """Look at what a session looked at. Call it before the widgets are drawn (in a callback): it sets their values.

    Raises an `InterpError` naming the first thing that cannot be used; nothing is changed then.
    """
    new, page = checked(content)
    set_behaviour(new)
    for name in ("model", "task", "n", "clean", "corrupt", "answer", "wrong"):
        st.session_state[f"form_{name}"] = getattr(new, name)
    select(content["selection"].get("primary"))
    pin(content["selection"].get("pinned"))
    st.session_state[KEY] = {name: content[name] for name in ("pins", "groups", "notes")}
    for name, value in page.items():
        st.session_state[WIDGETS.get(name, name)] = value


def read_session(data: bytes) -> dict[str, Any]:
    """The content of a session file; `OptionError` in one sentence if it is none."""
    if len(data) > MAX_BYTES:
        raise OptionError(f"a session file has at most {MAX_BYTES:,} bytes, not {len(data):,}")
    try:
        content = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise OptionError(f"this is not a session file: not valid JSON ({str(error)[:100]})") from None
    _kind(content, dict, "a session file")
    return content


def checked(content: dict[str, Any]) -> tuple[Behaviour, dict[str, Any]]:
    """(its behaviour, values of the circuit page's widgets), when all of it can be used."""
    if content.get("format") != FORMAT:
        raise OptionError(f"this is not a session file: it does not say format {FORMAT!r}")
    if content.get("version") != VERSION:
        raise OptionError(
            f"the session file is of version {str(content.get('version'))[:20]}, and version {VERSION} is read"
        )
    for name, kind in FIELDS.items():
        if name not in content:
            raise OptionError(f"the session file lacks {name!r}")
        _kind(content[name], kind, name)
    new = _behaviour(content["behaviour"])
    cfg = locked_model(new.model).cfg
    for name in ("primary", "pinned"):
        place = content["selection"].get(name)
        if place is not None and parse_cell(_text(place, name)) is None:
            parse_node(place, cfg)
    groups = content["groups"]
    for name, nodes in groups.items():
        _text(name, "the name of a group")
        _kind(nodes, list, f"group {name!r}")
    for text in content["notes"].values():
        _text(text, "a note")
    if len(groups) > MAX_NAMES:
        raise OptionError(f"a session file has at most {MAX_NAMES:,} groups, not {len(groups):,}")
    grouped = [node for nodes in groups.values() for node in nodes]
    for what, nodes in (("pins", content["pins"]), ("notes", list(content["notes"])), ("groups", grouped)):
        _some(nodes, what)
        for node in nodes:
            parse_node(_text(node, what), cfg)
    return new, _page(content["circuit"], Graph.of(cfg), cfg)


def _behaviour(content: dict[str, Any]) -> Behaviour:
    kinds = {field.name: type(field.default) for field in fields(Behaviour)}
    if strange := [name for name in content if name not in kinds]:
        raise TaskError(f"the session's behaviour has a field {strange[0][:40]!r} that no behaviour has")
    for name, value in content.items():
        if type(value) is not kinds[name]:
            raise TaskError(f"the session's {name} is {str(value)[:40]!r}, not a {kinds[name].__name__}")
    new = Behaviour(**content).checked()
    if new.seed < 0:
        raise TaskError(f"the session's seed is {new.seed}, and seeds begin at 0")
    allowed(new.model)
    return new


def _page(content: dict[str, Any], graph: Graph, cfg) -> dict[str, Any]:
    """Values of the circuit page's widgets."""
    found = {name: one_of(_text(content[name], name), CHOICES[name], name) for name in CHOICES if name in content}
    if "share" in content:
        share = content["share"]
        if type(share) not in (int, float) or not 0.5 <= share <= 0.99:
            raise OptionError(f"the session's share of influence is {str(share)[:20]}, not a number of 0.5 to 0.99")
        found["share"] = float(share)
    if "chosen" in content:
        _kind(content["chosen"], list, "chosen")
        _some(content["chosen"], "chosen")
        chosen = [_text(name, "chosen") for name in content["chosen"]]
        select_edges(graph, [name for name in chosen if "->" in name])
        for name in chosen:
            if "->" not in name and parse_node(name, cfg).kind == "neuron":
                raise SiteError(f"the circuit's graph has no node {name}: its components are heads and whole MLPs")
        found["chosen"] = chosen
    return found


def _kind(value: Any, kind: type, what: str) -> None:
    if not isinstance(value, kind):
        raise OptionError(f"{what} is not a {'mapping' if kind is dict else 'list'} but {str(value)[:40]!r}")


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str) or len(value) > MAX_TEXT:
        raise OptionError(f"{what} is not a text of at most {MAX_TEXT:,} characters: {str(value)[:40]!r}")
    return value


def _some(values: list, what: str) -> None:
    if len(values) > MAX_NAMES:
        raise OptionError(f"a session file has at most {MAX_NAMES:,} nodes in {what}, not {len(values):,}")
