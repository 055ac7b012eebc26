"""Jobs and their results: how far they are, what came of them, and two of them side by side."""

import pandas as pd
import streamlit as st
import xarray as xr

from app import compute, export, jobs
from app.charts import heatmap
from app.sidebar import set_behaviour, stop
from app.texts import plain
from interp import compare
from interp.agreement import STATISTICS
from interp.circuits.report import curve_figure
from interp.errors import InterpError
from interp.jobs.spec import Job
from interp.jobs.store import STATUSES

CELLS, ROWS = 4000, 30  # more cells than that are unreadable as a map: the strongest rows are shown instead

st.title("Runs")
ids = jobs.runs().ids()
if not ids:
    st.info("No runs yet. Work that takes longer than a few seconds is offered as a job on the page where it is asked for, "
            f"and is kept in the folder {jobs.runs().folder.name}.", icon=":material/history:")  # fmt: skip
    st.stop()
left, right = st.columns([2, 3])
text = left.text_input("Filter", key="runs_filter", bind="query-params", placeholder="words: ioi patch noise")
statuses = right.multiselect("Status", STATUSES, key="runs_status", bind="query-params", placeholder="any")


@st.fragment(run_every=2 if any(jobs.poll_quietly(id) for id in ids) else None, key="runs_list")
def listed() -> None:
    """The table; its first selected row is opened, its second compared with."""
    if st.session_state.pop("runs_picked", False):
        st.rerun()  # a click here draws the table only, and what is below it has changed
    shown = jobs.table(text, tuple(statuses))
    if shown.empty:
        st.info(f"None of {len(ids)} runs matches: empty the filter to see all.", icon=":material/filter_alt_off:")
        return
    st.dataframe(
        shown, hide_index=True, width="stretch", key="runs_table", selection_mode="multi-row",
        on_select=jobs.take_rows, alt=f"{len(shown)} runs, the latest first",
        column_config={"seconds": st.column_config.NumberColumn("seconds", format="%.1f"),
                       "submitted": st.column_config.DatetimeColumn("submitted", format="YYYY-MM-DD HH:mm:ss", timezone="UTC",
                                                                    help="UTC")},
    )  # fmt: skip
    st.session_state["runs_shown"] = shown.id.tolist()
    st.caption(f"{len(shown)} of {len(ids)} runs. Select a row to open it, a second one to compare with it.")


def draw(mean: xr.DataArray, *, title: str, key: str) -> None:
    """A map, or the strongest rows where there is no readable one."""
    if mean.ndim == 2 and mean.size <= CELLS:
        chart = heatmap(mean, title=title, selectable=False)
        if mean.dims == ("source", "target"):
            chart["yAxis"]["name"], chart["xAxis"]["name"] = "writes", "reads"
            chart["xAxis"]["axisLabel"] = {"rotate": 90}  # as many labels as there is room for; the others by hovering
        height = max(420, 150 + 16 * mean.shape[0])
        st.echarts_chart(chart, key=key, height=height, alt=f"Heatmap: {title}")
        return
    rows = export.table_of(mean)
    rows = rows.sort_values("effect", key=lambda c: -c.abs(), kind="stable")
    hidden = [c for c in ("metric_clean", "metric_corrupt") if c in rows]
    st.dataframe(rows.drop(columns=hidden).head(ROWS), hide_index=True, width="stretch", key=f"{key}_rows", alt=title)
    st.caption(f"{title}: the {min(ROWS, len(rows))} strongest of {len(rows):,} places.")


def one_job(id: str, key: str) -> Job:
    """The job of a run that is looked at: the only one, or the chosen one."""
    asked = jobs.grid(id).everything
    if len(asked) == 1:
        return asked[0]
    names = {each.id: jobs.title(each) for each in asked}
    return jobs.job(id, st.selectbox("Job", list(names), format_func=names.get, key=key, help=f"One of {len(asked):,}"))


def one_site(result: xr.DataArray | xr.Dataset, key: str) -> xr.DataArray:
    """The result, or the chosen one of several sites, knowing its site."""
    if isinstance(result, xr.DataArray):
        return result
    name = st.selectbox("Site", list(result.data_vars), key=key, help="This run scored several sites")
    return result[name].assign_attrs({**result.attrs, **result[name].attrs})


def look(asked) -> None:
    """Button callback: the sidebar takes the run's model and prompts."""
    try:
        set_behaviour(jobs.behaviour_of(asked))
        st.toast("Every page now looks at the prompts of this run.", icon=":material/visibility:")
    except InterpError as error:
        st.session_state["runs_error"] = str(error)


def draw_measures(found: xr.Dataset, asked: Job, id: str) -> None:
    """What a job measured as a whole: numbers in a table, and of a circuit its faithfulness at growing sizes."""
    st.dataframe(jobs.measures(found), hide_index=True, key=f"measures_{id}", alt=f"Measures of {jobs.title(asked)}",
                 column_config={"value": st.column_config.NumberColumn(format="%.4f")})  # fmt: skip
    if asked.kind == "circuit":
        st.plotly_chart(curve_figure(found, title=jobs.title(asked)), key=f"curve_{id}",
                        alt="Faithfulness of the circuit at growing shares of edges, ranked by help and by size")  # fmt: skip
        where = "other pairs of the task" if found.attrs["held_out"] else "the pairs that it was scored on"
        st.caption(
            f"Measured on {where}; ablation {found.attrs['ablation']}. CMD: lower is better. CPR: higher is better."
        )


def summarised(id: str) -> None:
    """All jobs of a run side by side: its report's figures and tables."""
    for number, section in enumerate(compute.attempt(jobs.whole, id).sections):
        st.markdown(f"**{section.title}**")
        st.text(section.says)
        for note in section.notes:
            st.info(plain(note), icon=":material/info:")
        for caption, figure in section.figures.items():
            st.plotly_chart(figure, key=f"whole_{id}_{number}_{caption}", alt=caption)
        for caption, rows in section.tables.items():
            st.caption(plain(caption))
            st.dataframe(rows, hide_index=True, key=f"whole_{id}_{number}_{caption}_rows", alt=caption)


def opened(id: str) -> tuple[Job, xr.DataArray] | None:
    """A run: what it was asked, how it stands, what can be done with it, and a result. Its job and scores, if it is a map."""
    try:
        run = jobs.poll(id)
        st.subheader(jobs.run_title(id))
        asked = one_job(id, f"job_of_{id}")
    except (InterpError, OSError) as error:
        stop(error)
    if run.active:
        jobs.job_panel(id)
    else:
        (st.error if run.status == "failed" else st.caption)(jobs.sentence(run))
    actions = st.container(horizontal=True)
    if not run.active and run.status != "done":
        actions.button("Go on", key="runs_resume", on_click=jobs.submit, args=(jobs.grid(id),), icon=":material/play_arrow:",
                       help="What is done is not computed again")  # fmt: skip
    if asked.task or asked.clean:
        actions.button(
            "Look at these prompts", key="runs_look", on_click=look, args=(asked,), icon=":material/visibility:"
        )
    if wrong := st.session_state.pop("runs_error", None):
        st.error(wrong, icon=":material/error:")
    several = len(jobs.grid(id).everything) > 1
    if several and not run.active and st.toggle("All jobs side by side", key="runs_whole", bind="query-params"):
        summarised(id)
        return None
    try:
        found = jobs.result(id, asked.id)
    except InterpError as error:
        if run.status == "done" or several:
            st.info(str(error), icon=":material/info:")
        return None
    if not jobs.is_map(found):
        draw_measures(found, asked, id)
        return None
    scores = one_site(found, f"site_{id}")
    mean, about = jobs.flat(scores), scores.attrs
    st.caption(f"{about['sign']}. Mean of {scores.sizes['prompt']} pairs; {about['metric']} [{about['unit']}].")
    draw(mean, title=jobs.title(asked), key=f"map_{id}")
    export.figure_and_data(mean, scores, name=f"run-{id}")
    return asked, scores


def compared(asked: Job, scores: xr.DataArray, id: str, with_id: str) -> None:
    """Difference and agreement of two runs' jobs."""
    st.subheader("Compared")
    other = one_job(with_id, f"job_with_{with_id}")
    try:
        found = jobs.result(with_id, other.id)
    except InterpError as error:
        st.info(f"{jobs.title(other)} has no result to compare with. {error}", icon=":material/info:")
        return
    if not jobs.is_map(found):
        st.info(f"{jobs.title(other)} has no map to compare with.", icon=":material/info:")
        return
    theirs = one_site(found, f"other_site_{with_id}")
    differing = [name for name in ("model", "task", "seed", "clean") if getattr(asked, name) != getattr(other, name)]
    if differing:
        st.warning(f"The two differ in {', '.join(differing)}: places and prompts of the same number need not correspond.",
                   icon=":material/warning:")  # fmt: skip
    # of an estimate and an exact result, the exact one is the reference
    exact = {"patch", "edges"}
    swapped = asked.kind in exact and other.kind not in exact
    first, second, ours = (theirs, scores, False) if swapped else (scores, theirs, True)
    table = compute.attempt(compare, first, second)
    row = table.iloc[0]
    st.dataframe(pd.DataFrame({"statistic": STATISTICS, "value": [row[s] for s in STATISTICS],
                               "low": [row[f"{s}_low"] for s in STATISTICS], "high": [row[f"{s}_high"] for s in STATISTICS]}),
                 hide_index=True, key="agreement", alt="Agreement of the two runs with 95 % bootstrap intervals",
                 column_config={c: st.column_config.NumberColumn(format="%.3f") for c in ("value", "low", "high")})  # fmt: skip
    names = ("the opened run", "the other") if ours else ("the other", "the opened run")
    places = f"{int(row['n']):,} places that can change"
    st.caption(f"{names[0].capitalize()} against {names[1]}, over {places}; 95 % intervals over prompts.")
    draw(jobs.difference(scores, theirs), title="the opened run − the other", key=f"difference_{id}_{with_id}")


listed()
label, (run_id, with_id) = jobs.labels(ids), jobs.opened()
jobs.open_runs(run_id, with_id)
st.session_state["runs_run"], st.session_state["runs_with"] = run_id, with_id
columns = st.columns(2)
columns[0].selectbox("Open", ids, index=None, format_func=label.get, key="runs_run", on_change=jobs.take_choice,
                     placeholder="a run of the table")  # fmt: skip
if run_id is None:
    st.info("Open a run to see its map.", icon=":material/ads_click:")
    st.stop()
columns[1].selectbox("Compare with", [id for id in ids if id != run_id], index=None, format_func=label.get, key="runs_with",
                     on_change=jobs.take_choice, placeholder="another run")  # fmt: skip
found = opened(run_id)
if found is not None and with_id is not None:
    compared(*found, run_id, with_id)
