"""What the model reads and predicts: tokens of a pair, the logit lens, next tokens, attention patterns."""

import streamlit as st

from app import export, looking
from app.charts import LABELLED, attention, attention_grid, heatmap, height_of, token_strip, visible
from app.compute import attempt
from app.selection import place_at, place_of, select, selection
from app.sidebar import behaviour, current_model
from app.tables import answers_text, cell_chooser, pair_chooser, token_table
from interp.errors import InterpError

st.title("Prompt")
now, cfg = behaviour(), current_model().cfg

left, middle, right, far = st.columns([1, 2, 2, 2])
prompt = pair_chooser(left, now)
tokens = attempt(looking.pair, now, prompt)
run = middle.segmented_control("Run", ["clean", "corrupt"], default="clean", key="run", required=True, bind="query-params",
                               help="Which of the two prompts lens, attention and relevance are taken from")  # fmt: skip
names = looking.metric_names(bool(tokens["wrong"]))
metric = right.selectbox("Metric", names, key="lens_metric", bind="query-params", help="What lens and relevance are in")
coloured = far.segmented_control(
    "Colour tokens by", ["nothing", "relevance"], default="nothing", key="colour", required=True, bind="query-params",
    help="Relevance (AttnLRP): what each token adds to the metric of the run, from one backward pass",
) == "relevance"  # fmt: skip


def strip() -> None:
    """The pair, position by position."""
    shares = None
    if coloured:
        try:
            shares = looking.relevance(now, run, metric).values[prompt][: len(tokens[run])].tolist()
        except InterpError as error:
            st.warning(str(error), icon=":material/warning:")
    # the coloured prompt stands on top
    first, second = (run, "corrupt" if run == "clean" else "clean") if shares else ("clean", "corrupt")
    st.html(token_strip(tokens[first], tokens[second], relevance=shares))
    clean, corrupt = tokens["clean"], tokens["corrupt"]
    differ = sum(a != b for a, b in zip(clean, corrupt, strict=True))
    st.caption(
        f"Above: {first} prompt; below: {second} prompt, · where it is the same; {differ} of {len(clean)} tokens differ. "
        f"{answers_text(tokens)}" + (" Blue raises the metric, red lowers it." if shares else "")
    )


strip()
whole = attempt(looking.lens, now, run, metric)
texts, likely = attempt(looking.lens_tokens, now, prompt, run)
n_tokens = len(tokens[run])
# this pair's own tokens along the axis: those of the array are the first pair's
shown = whole.isel(prompt=prompt, position=slice(0, n_tokens)).drop_vars(["metric", "prompt"])
shown = shown.assign_coords(token=("position", [f"{i}:{visible(t)}" for i, t in enumerate(tokens[run])]))


@st.fragment
def lens() -> None:
    """The logit lens, and what the stream says at the cell that was clicked."""
    key = f"lens_{run}_{prompt}_{metric}"

    def choose() -> None:
        if place := looking.lens_place(place_of(st.session_state[key], shown), cfg.n_layers):
            select(place)

    st.subheader("Logit lens")
    cells = {kind: looking.lens_cell(place, cfg.n_layers, n_tokens)
             for kind, place in (("pinned", selection().pinned), ("selected", selection().primary))}  # fmt: skip
    where = "in the cells" if n_tokens <= LABELLED else "under the pointer"
    unit = f" ({shown.attrs['unit']})" if shown.attrs.get("unit") else ""
    st.echarts_chart(
        heatmap(shown, subtitle=f"{metric}{unit} read from the stream after so many layers; {where}: the likeliest token",
                labels=texts, marks={cell: kind for kind, cell in cells.items() if cell}),
        key=key, on_select=choose, height=height_of(shown),
        alt=f"Logit lens of the {run} prompt: {metric} by layers read and position",
    )  # fmt: skip
    cell_chooser(shown, cells["selected"], key="lens_cell",
                 take=lambda y, x: select(looking.lens_place(place_at(shown, y, x), cfg.n_layers)))  # fmt: skip
    left, right = st.columns(2)
    with left:
        st.markdown("**Next token** after the whole prompt")
        token_table(attempt(looking.next_tokens, now, prompt), key="next")
    with right:
        chosen = cells["selected"] or (cfg.n_layers, n_tokens - 1)
        layer, position = chosen
        st.markdown(f"**Decoded here**: after {layer} of {cfg.n_layers} layers, position {position}")
        token_table(attempt(looking.decoded, now, prompt, run, layer, position), key="decoded")
        st.caption(
            f"Click a cell of the lens to decode the stream there. Likeliest here: {likely[layer, position]:.1%}."
            if cells["selected"] else "Click a cell of the lens to decode the stream there; now it is where the answer is read."
        )  # fmt: skip


lens()


@st.fragment
def heads() -> None:
    """Attention patterns: one head, and all of its layer on demand."""
    st.subheader("Attention")
    left, middle, right = st.columns(3, vertical_alignment="bottom")
    layer = left.selectbox("Layer", range(cfg.n_layers), key="layer", bind="query-params")
    head = middle.selectbox("Head", range(cfg.n_heads), key="head", bind="query-params")
    every = right.toggle("All heads of the layer", key="all_heads", bind="query-params")
    values = attempt(looking.patterns, now, prompt, run, layer)
    st.echarts_chart(
        attention(values[head], tokens[run], title=f"a{layer}.h{head}, {run} prompt"), key="attention",
        height=min(170 + 20 * n_tokens, 700), alt=f"Attention pattern of head {head} in layer {layer}: query by key",
    )  # fmt: skip
    if every:
        options = attempt(attention_grid, values, tokens[run])
        st.echarts_chart(options, key="all_attention", height=210 * -(-cfg.n_heads // 4),
                         alt=f"Attention patterns of all heads of layer {layer}")  # fmt: skip


heads()
export.figure_and_data(shown, whole, name="lens")
export.notebook(now, f'lens = interp.logit_lens(model, pairs, run="{run}", metric="{metric}")\n'
                     f"interp.plots.heatmap(lens.sel(prompt={prompt}))", extra="import interp.plots")  # fmt: skip
