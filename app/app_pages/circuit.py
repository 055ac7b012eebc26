"""How the places that carry the answer connect: a graph of scored edges, what a selection does, and everything about one node."""

import json

import pandas as pd
import streamlit as st

from app import circuits, compute, export, jobs, looking
from app.charts import visible
from app.selection import select, selection
from app.session import KEY as NOTES
from app.session import MAX_BYTES, MAX_TEXT, annotated, marks, open_session, read_session, save_session
from app.sidebar import behaviour, current_model
from interp import METRICS, Circuit
from interp.circuits.graph import writers
from interp.errors import InterpError
from interp.rules import RULES
from interp.sites import parse_node

st.title("Circuit")
now, cfg = behaviour(), current_model().cfg
one, two, three, four = st.columns(4)
method = one.selectbox(
    "Scores",
    circuits.METHODS,
    key="method",
    bind="query-params",
    help="How edges are scored: from a few passes, or each patched by itself",
)
rules = two.selectbox(
    "Rules",
    list(RULES),
    key="edge_rules",
    bind="query-params",
    disabled=method == "exact",
    help="How the backward pass goes through the model",
)
metric = three.selectbox(
    "Metric", list(METRICS), index=list(METRICS).index("logit_diff"), key="metric", bind="query-params"
)
ablation = four.selectbox("Ablation", circuits.QUICK_ABLATIONS, key="ablation", bind="query-params",
                          help="What everything outside the circuit, or in your selection, puts out instead")  # fmt: skip
asked = (now, method, "gradient" if method == "exact" else rules, metric)
if method == "exact" and compute.attempt(lambda: jobs.result_or_offer(circuits.exact_job(now, metric))) is None:
    st.stop()
ranked = Circuit.ranked(compute.attempt(circuits.mean_scores, *asked))


def clicked(key: str, view: circuits.GraphView) -> None:
    """The chart says what is selected on it: that is the selection, the newest of it the primary place."""
    event, old = st.session_state.get(key), list(st.session_state.get("chosen", []))
    nodes, edges = circuits.nodes_clicked(event, view), circuits.edges_clicked(event, view)
    kept = [name for name in old if name in nodes or name not in view.nodes]  # edges are taken out in the list only
    new = [name for name in (*nodes, *edges) if name not in old]
    st.session_state["chosen"] = kept + new
    if added := [name for name in new if name in view.nodes]:
        select(added[-1])


def listed() -> None:
    """The list was changed by hand: the chart is drawn anew with it."""
    st.session_state["circuit_mount"] = st.session_state.get("circuit_mount", 0) + 1
    if nodes := [name for name in st.session_state["chosen"] if "->" not in name]:
        select(nodes[-1])


@st.fragment
def explore() -> None:
    """Graph, selection and all that follows from them."""
    left, right = st.columns([3, 2], gap="medium")
    with right:
        share = st.slider("Share of influence kept", 0.5, 0.99, 0.95, 0.01, key="share", bind="query-params",
                          help="The fewest edges whose |score| adds up to this share of all, then without dead ends")  # fmt: skip
    circuit = compute.attempt(circuits.by_influence, ranked, share)
    shown = circuits.drawable(circuit)
    if "chosen" in st.session_state:  # a selection made for another model
        st.session_state["chosen"] = circuits.known(st.session_state["chosen"], circuit.graph)
    with left:
        draw(circuit, shown)
        nodes = [*writers(circuit.graph), "logits"]
        options = list(dict.fromkeys([*nodes, *shown.table().edge[:500], *st.session_state.get("chosen", [])]))
        chosen = st.multiselect("Selection", options, key="chosen", on_change=listed, bind="query-params",
                                placeholder="Click nodes and edges, or choose them here")  # fmt: skip
    with right:
        intervene(circuit, share, tuple(circuits.known(chosen, circuit.graph)))
        about = [name for name in chosen if name in nodes]
        node = selection().primary
        if node not in (about or nodes):
            node = about[-1] if about else None
        if node is not None:
            st.subheader(node)
            annotate(node)
            connections(circuit, node)
    if node is not None:
        with left:
            attends(node)
            writes(node)
    take_home(circuit, chosen)


def draw(circuit: Circuit, shown: Circuit) -> None:
    """The graph, with what is hidden said in numbers."""
    st.caption(circuits.shown_text(shown, circuit))
    if not shown.n_edges:
        st.info("No edge is left at this share: move the slider to the right.", icon=":material/network_node:")
        return
    mine = marks()
    drawn = {"pins": mine["pins"], "groups": mine["groups"], "notes": mine["notes"],
             "dark": st.context.theme.type == "dark"}  # fmt: skip
    view = circuits.graph_spec(shown, **drawn)
    key = f"graph_{view.digest}_{st.session_state.get('circuit_mount', 0)}"
    # what was selected when this chart was first drawn stays in its spec: another spec would undo pan and zoom at every click
    first = st.session_state.get("circuit_first")
    if first is None or first["key"] != key:
        first = st.session_state["circuit_first"] = {"key": key, "chosen": list(st.session_state.get("chosen", []))}
    st.echarts_chart(view.selecting(first["chosen"]).spec, key=key, on_select=lambda: clicked(key, view), height=480,
                     alt=f"Circuit of {shown.n_edges} edges between {len(shown.nodes)} components")  # fmt: skip
    st.caption(f"Blue raises the metric, red lowers it; the wider, the larger |score| ({ranked.attrs.get('unit')}). "
               "Drag to pan, scroll to zoom, click to select.")  # fmt: skip


def intervene(circuit: Circuit, share: float, chosen: tuple[str, ...]) -> None:
    """Faithfulness of what is shown; the metric without what is selected."""
    able = tuple(name for name in chosen if name != "logits")
    ablate = st.button("Ablate the selection", icon=":material/content_cut:", disabled=not able, key="ablate", type="primary",
                       width="stretch", help="Replaces what it carries, as set under Ablation")  # fmt: skip
    if ablate:
        st.session_state["ablated"] = able
    done = able if able and st.session_state.get("ablated") == able else ()
    found = compute.attempt(circuits.measured, *asked, share, done, ablation)
    f, value = found.faithfulness.to_series(), found.value.mean("prompt").to_series()
    clean, empty = float(found.metric_clean.mean()), float(found.metric_empty.mean())
    row = st.columns(3)
    nothing = "Corrupt" if ablation == "corrupt" else "No edge"
    row[0].metric("Clean", f"{clean:.3f}", help=f"Mean {metric} of the clean runs: the whole model")
    row[1].metric(nothing, f"{empty:.3f}", help=f"With no edge left, all ablated ({ablation})")
    row[2].metric("Circuit", f"{value['circuit']:.3f}", help="With the circuit's edges only")
    low, high = float(found.low[0]), float(found.high[0])
    st.markdown(f"**Faithfulness of this circuit {f['circuit']:.1%}** (95 % interval {low:.1%} to {high:.1%})")
    if done:
        row = st.columns(2)
        for part, label, before in ((row[0], "model", clean), (row[1], "circuit", value["circuit"])):
            after = value[f"{label} without"]
            part.metric(f"{label.title()} without selection", f"{after:.3f}", f"{after - before:+.3f}")
        st.caption(
            f"Faithfulness without the selection: model {f['model without']:.1%}, circuit {f['circuit without']:.1%}"
        )
    elif able:
        st.caption(f"{len(able)} selected. Ablate them to see the metric move.")
    else:
        st.info("Click a node or an edge to look into it and to ablate it.", icon=":material/ads_click:")


def connections(circuit: Circuit, node: str) -> None:
    """Its edges in the circuit, strongest first."""
    into, out = circuits.edges_of(circuit, node)
    for label, table in ((f"Into {node}", into), (f"Out of {node}", out)):
        if len(table):
            st.markdown(f"{label}: {len(table):,} edge{'' if len(table) == 1 else 's'}, sum {table.score.sum():+.3g}")
            st.dataframe(table, hide_index=True, width="stretch", height=min(176, 38 + 35 * len(table)), key=f"edges_{label[:4]}",
                         column_config={"score": st.column_config.NumberColumn(format="%+.4f")})  # fmt: skip
        else:
            st.caption(f"{label}: no edge of this circuit.")


def keep(node: str) -> None:
    """What the form says of a node is said from now on."""
    pinned, group, note = (st.session_state[f"{name}_{node}"] for name in ("pinned", "group", "note"))
    st.session_state[NOTES] = annotated(marks(), node, pinned=pinned, group=group[:60], note=note[:MAX_TEXT])


def annotate(node: str) -> None:
    """Pin it, put it into a group, write something about it. Kept for this session and in session files."""
    mine = marks()
    with st.popover("Pin, group, note", icon=":material/edit_note:", width="stretch"):
        st.toggle("Pinned", node in mine["pins"], key=f"pinned_{node}", help="Drawn with a dashed border")
        st.text_input("Group", next((g for g, nodes in mine["groups"].items() if node in nodes), ""), key=f"group_{node}",
                             max_chars=60, help="Nodes of a group have borders of one colour")  # fmt: skip
        st.text_area("Note", mine["notes"].get(node, ""), key=f"note_{node}", max_chars=MAX_TEXT)
        st.button("Keep", key="keep", type="primary", on_click=keep, args=(node,))
    if note := mine["notes"].get(node):
        st.text(note)


def writes(node: str) -> None:
    """What it writes to the logits, as a share of the metric and in tokens."""
    try:
        share = circuits.logit_shares(now, metric)
        if node in share:
            st.markdown(f"**Direct share of the metric {share[node]:+.3f}** of {share.sum():.3f}",
                        help="What it writes at the last position of the clean run, straight through the final norm")  # fmt: skip
    except InterpError as error:
        st.caption(str(error))
    if parse_node(node).kind in ("head", "mlp"):
        table = compute.attempt(circuits.node_tokens, now, node)
        sides = {side: rows.reset_index(drop=True) for side, rows in table.groupby("side")}
        st.markdown(
            "Tokens that its output raises and lowers",
            help="Clean less corrupt output at the last position, by the unembedding",
        )
        columns = {"raised": "top", "lowered": "bottom"}
        st.dataframe(
            pd.DataFrame({title: part for name, side in columns.items() for title, part in
                          ((name, sides[side].token.map(visible)), (f"{name}, logits", sides[side].value))}),
            hide_index=True, width="stretch", key="node_tokens", column_config={
                f"{name}, logits": st.column_config.NumberColumn("logits", format="%+.3f") for name in columns},
        )  # fmt: skip


def attends(node: str) -> None:
    """Where a head attends on one pair."""
    found = parse_node(node)
    if found.kind != "head":
        return
    texts = compute.tokens(now)
    prompts = len(texts["clean"])
    where = st.columns([2, 1], vertical_alignment="bottom")
    i = int(where[0].number_input(f"Attention of {node} on pair", 0, prompts - 1, 0, key="pair")) if prompts > 1 else 0
    run = where[1].segmented_control("Run", ["clean", "corrupt"], default="clean", required=True, key="pair_run")
    i = min(max(i, 0), prompts - 1)
    pattern = compute.attempt(looking.patterns, now, i, run, found.layer)[found.index]
    labels = [visible(token) for token in texts[run][i]]
    st.echarts_chart(circuits.attention_spec(pattern, labels), key=f"attention_{node}", height=420,
                     alt=f"Attention of {node}: query tokens by key tokens")  # fmt: skip


def take_home(circuit: Circuit, chosen: list[str]) -> None:
    """Files of this circuit and of this session."""
    with st.expander("Download", icon=":material/download:"):
        columns = st.columns(4)
        columns[0].download_button("Circuit (JSON)", lambda: circuits.circuit_json(circuit), "circuit.json", None,
                                   key="circuit_json", on_click="ignore", help="For Circuit.load, EAP-IG and MIB")  # fmt: skip
        columns[1].download_button("Drawing (HTML)", lambda: circuit.draw().to_html(include_plotlyjs=True).encode(),
                                   "circuit.html", "text/html", key="circuit_html", on_click="ignore")  # fmt: skip
        columns[2].download_button("Edges (CSV)", lambda: circuit.table().to_csv(index=False).encode(), "edges.csv", "text/csv",
                                   key="edges_csv", on_click="ignore")  # fmt: skip
        columns[3].download_button("Edges (parquet)", lambda: circuit.table().to_parquet(index=False), "edges.parquet",
                                   key="edges_parquet", on_click="ignore")  # fmt: skip
        columns[0].download_button("Save session", json.dumps(save_session(), indent=1).encode(), "session.json",
                                   "application/json", key="save_session", on_click="ignore",
                                   help="Behaviour, selection, share, pins, groups and notes")  # fmt: skip
        export.notebook(now, circuits.code_of(circuit, method, rules, metric, ablation, chosen))


@st.fragment
def measure_curve() -> None:
    """Faithfulness at ten sizes, when it is asked for."""
    with st.expander("Faithfulness at every size", icon=":material/show_chart:"):
        if st.button("Measure", key="curve") or st.session_state.get("curve_of") == (*asked, ablation):
            st.session_state["curve_of"] = (*asked, ablation)
            found = compute.attempt(circuits.curve, *asked, ablation)
            st.echarts_chart(
                circuits.curve_spec(found), key="curve_chart", height=340, alt="Faithfulness by share of edges kept"
            )
            st.caption(f"CPR {float(found.cpr):.3f} (area under the curve, most helpful first), "
                       f"CMD {float(found.cmd):.3f} (area between the curve and 1, largest first).")  # fmt: skip
        else:
            st.caption("Measure circuits of ten sizes, from a thousandth of the edges to all of them.")


def opened() -> None:
    """A session file came in."""
    st.session_state.pop("session_error", None)
    if (file := st.session_state.get("session_file")) is None:
        return
    try:
        open_session(read_session(file.getvalue()))
    except InterpError as error:
        st.session_state["session_error"] = str(error)


def session_file() -> None:
    """Open what somebody saved: behaviour, selection, pins, groups and notes."""
    with st.expander("Open a session", icon=":material/folder_open:", expanded="session_error" in st.session_state):
        st.file_uploader(
            "Session file", "json", key="session_file", on_change=opened, max_upload_size=-(-MAX_BYTES // 2**20)
        )
        if problem := st.session_state.get("session_error"):
            st.error(problem, icon=":material/error:")


explore()
measure_curve()
session_file()
