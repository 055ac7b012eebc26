"""Neurons by the tokens that their weights stand for: search them, read one in text, hold it at a value and see what follows."""

import pandas as pd
import streamlit as st

from app import dictionaries as data
from app import export
from app.cards import chosen_row, context_table, neuron_of, prompt_choice, steer_button, token_bars
from app.charts import visible
from app.compute import attempt
from app.notebooks import neuron_code
from app.selection import select, selection
from app.sidebar import behaviour, current_model
from app.steered import Recipe
from app.texts import plain, typed
from interp.errors import InterpError, OptionError

SHOWN, TEXTS = 500, 100
DOES = {"up": "reads (up)", "gate": "reads (gate)", "down": "writes (down)"}

st.title("Neurons")
now, cfg = behaviour(), current_model().cfg
first, second, third, fourth = st.columns([2, 2, 2, 4])
matrix = first.segmented_control("Weights", data.matrices(now.model), default="down", key="matrix", required=True,
                                 bind="query-params", help="up, gate: what it reads; down: what it writes")  # fmt: skip
layers = ["all" if layer is None else str(layer) for layer in data.layer_choices(now.model)]
chosen = second.selectbox("Layer", layers, key="layers", bind="query-params")
layer_shown = None if chosen == "all" else int(chosen)
wanted = typed(third.text_input("Token, exactly", key="token", max_chars=60, bind="query-params", placeholder="␣Paris",
                                help="Most words begin with a space, typed as such or as ␣"))  # fmt: skip
with fourth:
    prompt = prompt_choice(attempt(data.prompt_texts, now), key="prompt")

table = attempt(data.neuron_table, now.model, matrix, layer_shown)
hint = None
if wanted:
    try:
        found = data.search(now.model, matrix, layer_shown, wanted)
        hit = found.merge(table.drop(columns="kurtosis"), on=["layer", "neuron"])
        if found.empty:
            hint = f"No neuron has {visible(wanted)!r} among its first tokens by these weights; others do."
    except OptionError as error:
        hit, hint = table.head(0), str(error)
else:
    hit = table
shown = hit.head(SHOWN).reset_index(drop=True)
KEY = (
    f"neurons|{now.model}|{matrix}|{chosen}|{wanted}"  # another table is another widget: its clicks are not this one's
)


def take_row() -> None:
    """The clicked row's neuron is the one selected."""
    place = chosen_row(st.session_state.get(KEY), [*zip(shown["layer"], shown["neuron"], strict=True)])
    if place is not None:
        select(f"m{place[0]}.n{place[1]}")


def take_number() -> None:
    """The typed neuron is the one selected."""
    select(f"m{st.session_state['neuron_layer']}.n{st.session_state['neuron']}")


@st.fragment
def panel() -> None:
    """The table and the card of the neuron that is selected in it."""
    if hint:
        st.info(plain(hint), icon=":material/search:")
    order = "best score first" if wanted else "highest kurtosis first"
    st.caption(f"Showing {len(shown):,} of {len(hit):,} neurons, {order}. Click a row.")
    st.dataframe(
        shown, hide_index=True, key=KEY, on_select=take_row, selection_mode="single-row", height=250, alt="Neurons as tokens",
        column_config={
            "layer": st.column_config.NumberColumn("layer", width=50),
            "neuron": st.column_config.NumberColumn("neuron", width=60),
            "pole": st.column_config.TextColumn("pole", width=50),
            "rank": st.column_config.NumberColumn("rank", width=50, help="Of the token among the pole's; 0: the first"),
            "kurtosis": st.column_config.NumberColumn("kurtosis", format="%.1f", width=70,
                                                      help="Excess kurtosis of its scores: high where few tokens stand out"),
            "score": st.column_config.NumberColumn("score", format="%.2f", width=60, help="Cosine of its weights with the token"),
            "+": st.column_config.TextColumn("first tokens, pole +"), "-": st.column_config.TextColumn("pole −"),
        },
    )  # fmt: skip
    place = neuron_of(selection().primary, cfg.n_layers, cfg.d_mlp)
    if place is not None:
        card(*place)
    elif len(shown):
        card(int(shown["layer"].iloc[0]), int(shown["neuron"].iloc[0]))
    else:
        st.info("Type another token, or none, to see neurons here.", icon=":material/scatter_plot:")


def card(layer: int, neuron: int) -> None:
    """One neuron: its weights as tokens, the prompt, contexts, a clamp."""
    st.session_state["neuron_layer"], st.session_state["neuron"] = layer, neuron
    name, one, other, button = st.columns([3, 2, 2, 3], vertical_alignment="bottom")
    name.subheader(f"m{layer}.n{neuron}")
    one.number_input("Layer", 0, cfg.n_layers - 1, step=1, key="neuron_layer", on_change=take_number)
    other.number_input("Neuron", 0, cfg.d_mlp - 1, step=1, key="neuron", on_change=take_number)
    with button:
        steer_button(Recipe("neuron", layer=layer, index=neuron), key="steer_with")
    rows = data.neuron_tokens(now.model, layer, neuron)
    columns = {f"{DOES[name]} {pole.replace('-', '−')}": part.sort_values("rank")["token"].astype(object).map(visible).tolist()
               for (name, pole), part in rows.groupby(["matrix", "pole"], observed=True)}  # fmt: skip
    left, right = st.columns(2, gap="medium")
    with left:
        st.markdown("**Weights as tokens**, first tokens of each pole")
        st.dataframe(
            pd.DataFrame(columns), hide_index=True, key=f"tokens_{layer}_{neuron}", height=250, alt="Weights as tokens"
        )
    with right:
        tokens, values = attempt(data.neuron_on_prompt, now, prompt, layer, neuron)
        st.markdown(f"**On the prompt**, from {values.min():.2f} to {values.max():.2f}")
        st.echarts_chart(token_bars(tokens, values, unit="activation"), key="on_prompt", height=250,
                         alt=f"Activation of neuron {neuron} of layer {layer} at each token of the prompt")  # fmt: skip
    in_text, hold = st.tabs(["In text", "Hold at a value"])
    with in_text:
        contexts(layer, neuron)
    with hold:
        value, site = clamp(layer, neuron)
    with st.expander("Download", icon=":material/download:"):
        with st.container(horizontal=True):
            export.table(hit, name="neurons", label="Neurons")
        with st.container(horizontal=True):
            export.table(rows, name=f"neuron-m{layer}-n{neuron}", label=f"Tokens of m{layer}.n{neuron}")
        text = data.prompt_texts(now)[prompt]
        export.notebook(now, neuron_code(now.model, (layer, neuron), prompt=text, value=value, site=site, search=wanted,
                                         matrix=matrix, layer=layer_shown))  # fmt: skip


def contexts(layer: int, neuron: int) -> None:
    """Where it fires with either sign."""
    poles = attempt(data.neuron_contexts, now.model, layer, neuron, TEXTS)
    signs = {"+": "positive", "-": "negative"} if cfg.gated else {"+": "positive"}
    for pole, sign in signs.items():
        if len(poles[pole]):
            st.markdown(f"**Most {sign}** in {TEXTS} texts, one place for each")
            context_table(
                poles[pole], key=f"contexts_{sign}_{layer}_{neuron}", alt=f"Contexts of its most {sign} activations"
            )
        else:
            st.info(f"It is {sign} nowhere in {TEXTS} texts.", icon=":material/blur_off:")
    if not cfg.gated:
        st.caption("Below 0, neurons of this model stay so near it that no context is of interest.")


def clamp(layer: int, neuron: int) -> tuple[float, str]:
    """Hold it at a value along the prompt; the test over all prompts on demand. Returns (value, where it is held)."""
    sites = ("post", "up", "gate") if cfg.gated else ("post", "up")
    left, right = st.columns([2, 3])
    site = left.segmented_control("Where", sites, default="post", key="site", required=True,
                                  help="post: its output; up, gate: before the non-linearity and the product")  # fmt: skip
    seen = [
        float(part["value"].abs().max())
        for part in data.neuron_contexts(now.model, layer, neuron, TEXTS).values()
        if len(part)
    ]
    largest = max(seen, default=0.0) or 1.0
    end = float(f"{2 * largest:.2g}")
    value = right.slider("Value", -end, end, float(f"{largest:.2g}"), step=end / 100, key=f"value_{layer}_{neuron}",
                         format="%.2f", help="At all positions of the prompt; at first the largest in the texts")  # fmt: skip
    effect = attempt(data.clamped, now, prompt, layer, neuron, float(value), site)
    effect = effect.assign(token=effect["token"].map(visible))
    columns = {name: st.column_config.NumberColumn(f"p {name}", format="%.4f") for name in ("before", "after")}
    st.dataframe(effect, hide_index=True, key=f"clamped_{layer}_{neuron}", alt="Next tokens before and after", height=250,
                 column_config={**columns, "difference": st.column_config.NumberColumn(format="%+.4f")})  # fmt: skip
    st.markdown("**Test**: does holding it raise a token more than holding other neurons of its layer does?")
    a, b, c = st.columns([2, 2, 2], vertical_alignment="bottom")
    first_token = data.neuron_tokens(now.model, layer, neuron).query("matrix == 'down' and pole == '+' and rank == 0")[
        "token"
    ]
    token = typed(
        a.text_input("Token", visible(str(first_token.iloc[0])), key=f"test_token_{layer}_{neuron}", max_chars=60)
    )
    sign = b.segmented_control("Sign", ["+", "−"], default="+", key="test_sign", required=True)
    if c.button("Test", key="test", help="Clamps it, and 20 others, on all clean prompts of the behaviour"):
        try:
            result = data.compared(now, layer, neuron, 1.0 if sign == "+" else -1.0, token, site)
        except InterpError as error:
            st.error(plain(str(error)), icon=":material/error:")
        else:
            st.dataframe(pd.DataFrame([{
                "change (nats)": result.effect, "others": result.control, "difference": result.difference, "low": result.low,
                "high": result.high, "p (prompts)": result.p, "p (neurons)": result.p_sets,
            }]), hide_index=True, key="tested", alt="Result of the test")  # fmt: skip
            st.caption(f"Log-probability of {plain(visible(result.token))}, mean of {len(result.changes)} prompts; 95 % interval "
                       f"of the difference; {len(result.control_changes)} others held at the same value.")  # fmt: skip
    return float(value), site


panel()
