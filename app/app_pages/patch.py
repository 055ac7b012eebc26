"""Which places carry the answer: exact maps, approximate maps beside them with their agreement, and any cell looked into."""

import numpy as np
import pandas as pd
import streamlit as st

from app import compute, export, jobs, looking
from app.charts import heatmap, height_of
from app.selection import parse_cell, pin, place_at, place_of, select, selection
from app.sidebar import behaviour, current_model
from app.tables import answers_text, cell_chooser, code, pair_chooser, token_table
from interp import compare
from interp.errors import InterpError
from interp.rules import RULES
from interp.sites import SITES

st.title("Patch")
now, cfg = behaviour(), current_model().cfg
sites = [name for name in SITES if name not in ("neuron", "pattern") and not (name == "resid_mid" and cfg.parallel)]
first = compute.attempt(looking.pair, now, 0)
left, middle, right, far = st.columns(4)
site = left.selectbox("Site", sites, key="site", bind="query-params", help="Which activation is replaced")
direction = middle.segmented_control(
    "Direction", ["denoise", "noise"], default="denoise", key="direction", required=True, bind="query-params",
    help="denoise: clean values into the corrupt run; noise: the reverse",
)  # fmt: skip
metric = right.selectbox("Metric", looking.metric_names(bool(first["wrong"])), key="metric", bind="query-params")
rules = far.selectbox(
    "Approximation", ["none", *RULES], key="rules", bind="query-params", help="One backward pass, by these rules"
)


def effects():
    """The exact effects: at once where that takes seconds, else from a job, which the reader starts; the page ends there."""
    if compute.attempt(looking.flops, now, site) <= looking.SMALL:
        return compute.attempt(looking.exact_map, now, site, metric, direction)
    asked = jobs.job_of(
        now, "patch", sites=site, metric=metric, direction=direction, positions=looking.positions_of(site, cfg)
    )
    found = jobs.result_or_offer(asked)
    if found is None:
        st.stop()
    return found


exact = compute.attempt(effects)
mean = exact.mean("prompt", keep_attrs=True)
by_head = "position" not in mean.dims
about = SITES[site].describe
pairs_text = f"{exact.sizes['prompt']} pair{'s' if exact.sizes['prompt'] > 1 else ''}"
how = (
    ", all positions patched at once."
    if by_head
    else ". Tokens along the axis are the first pair's, * where others differ."
)
st.caption(f"{about[:1].upper() + about[1:]}: {exact.attrs['sign']}. Mean of {pairs_text}{how}")


AGREEMENT = {
    "pearson": ("Pearson", "Correlation over all prompts and places"),
    "spearman": ("Spearman", "Rank correlation over the places that can change"),
    "slope": ("Slope", "Of approximate on exact: 1 if the scale is right"),
    "relative_error": ("Relative error", "Norm of the difference over the norm of the exact effects"),
    "sign": ("Right sign", "Share of the places that can change"),
    "top_k": ("Top 10", "Share of the ten strongest places that the approximation finds"),
}  # fmt: skip


def approximation():
    """The approximate effects; None, and a sentence, where these rules cannot be followed here."""
    if rules == "none":
        return None
    try:
        return looking.rough_map(now, site, metric, direction, rules)
    except InterpError as error:
        st.error(str(error), icon=":material/error:")
        return None


def agreement(rough) -> None:
    """How far the two maps agree, with intervals over prompts."""
    row = compare(rough, exact).iloc[0]
    st.markdown("**Agreement with exact patching**, all pairs and places")
    for column, (name, (label, what)) in zip(st.columns(len(AGREEMENT)), AGREEMENT.items(), strict=True):
        interval = f"95 % interval {row[f'{name}_low']:.2f} to {row[f'{name}_high']:.2f}"
        column.metric(label, f"{row[name]:.2f}", help=f"{what}; {interval}")


def marked(array) -> dict:
    """Cells of the selection and the pin that this map has."""
    return looking.marks(array, pinned=selection().pinned, selected=selection().primary)


@st.fragment
def maps() -> None:
    """Exact and approximate, one selection."""
    key = f"exact_{site}"

    def choose() -> None:
        if place := place_of(st.session_state[key], mean):
            select(place)

    rough = approximation()
    flat = None if rough is None else rough.mean("prompt", keep_attrs=True)
    # one colour range: equal colours are equal effects
    limit = max(
        (float(np.nanmax(np.abs(a))) for a in (mean, flat) if a is not None and np.isfinite(a).any()), default=1.0
    )
    columns = st.columns(1 if flat is None else 2)
    with columns[0]:
        st.echarts_chart(heatmap(mean, title="Exact", marks=marked(mean), limit=limit), key=key, on_select=choose,
                         height=height_of(mean), alt=f"Heatmap of exact effects of {site} by layer")  # fmt: skip
    if flat is not None:
        with columns[1]:
            drawn = heatmap(flat, title=f"Approximate: {rules}", selectable=False, marks=marked(flat), limit=limit)
            st.echarts_chart(
                drawn, key="rough", height=height_of(mean), alt=f"Heatmap of {rules} effects of {site} by layer"
            )
        agreement(rough)
    chosen = next(iter(looking.marks(mean, selected=selection().primary)), None)
    cell_chooser(mean, chosen, key=f"cell_{site}", take=lambda y, x: select(place_at(mean, y, x)))
    inspect()


def name_of(place: str) -> str:
    """A cell in words."""
    cell = parse_cell(place)
    where = "" if cell.position is None else f", position {code(str(exact.token.values[cell.position]))}"
    return f"{cell.site}, layer {cell.layer}{'' if cell.unit is None else f', head {cell.unit}'}{where}"


def inspect() -> None:
    """What is behind the selected cell: the next token once it is patched, its effect on each pair, and the pinned cell's."""
    place, pinned = selection().primary, selection().pinned
    values, others = looking.effect_at(exact, place), None if place == pinned else looking.effect_at(exact, pinned)
    if values is None:
        st.info("Click a cell, or choose it above, to patch it: next tokens and the effect on each pair appear here.",
                icon=":material/ads_click:")  # fmt: skip
        return
    title, button, clear = st.columns([5, 1, 1], vertical_alignment="bottom")
    title.subheader(name_of(place))
    button.button("Pin", icon=":material/keep:", on_click=pin, args=(place,), key="pin", disabled=place == pinned,
                  help="Keep this cell as the reference that others are compared with", width="stretch")  # fmt: skip
    clear.button("Unpin", icon=":material/keep_off:", on_click=pin, args=(None,), key="unpin", disabled=pinned is None,
                 width="stretch")  # fmt: skip
    left, right = st.columns(2)
    with left:
        prompt = pair_chooser(st, now)
        st.markdown(
            "**Next token with this cell patched**" + (", and with the pinned one" if others is not None else "")
        )
        try:
            token_table(
                looking.patched_tokens(now, (place, pinned) if others is not None else (place,), direction, prompt),
                key="patched",
            )
        except InterpError as error:
            st.warning(str(error), icon=":material/warning:")
        if others is not None:
            st.caption(f"Pinned: {name_of(pinned)}")
        st.caption(answers_text(compute.attempt(looking.pair, now, prompt)))
    with right:
        per_prompt(values, others)


def per_prompt(values: np.ndarray, others: np.ndarray | None) -> None:
    """Effects pair by pair, and their means."""
    gap = (exact.metric_clean - exact.metric_corrupt).values
    table = {"pair": exact.prompt.values, "effect": values}
    if others is not None:
        table |= {"pinned": others, "difference": values - others}
    unit = exact.attrs["unit"]
    st.markdown(f"**Effect on each pair** ({metric}, {unit})")
    texts = compute.tokens(now)
    table |= {"clean": exact.metric_clean.values, "corrupt": exact.metric_corrupt.values,
              "prompt": ["".join(t) for t in texts["clean"]]}  # fmt: skip
    numbers = {
        c: st.column_config.NumberColumn(c, format="%.3f")
        for c in ("effect", "pinned", "difference", "clean", "corrupt")
    }
    st.dataframe(pd.DataFrame(table), hide_index=True, width="stretch", key="inspected", column_config=numbers,
                 alt="Effect of the cell on each pair")  # fmt: skip
    text = f"Mean {np.nanmean(values):+.3f} {unit}; clean − corrupt is {gap.mean():+.3f}"
    if others is not None:
        text += f"; pinned {np.nanmean(others):+.3f}"
    st.caption(text + ".")


maps()
export.figure_and_data(mean, exact, name=f"patch-{site}")
positions = ', positions="all"' if by_head else ""
options = f'metric="{metric}", direction="{direction}"{positions}'
export.notebook(now, f'effects = interp.activation_patching(model, pairs, "{site}", {options})\ninterp.plots.heatmap(effects)',
                extra="import interp.plots")  # fmt: skip
