"""Texts with and without a change, side by side: a vector, a strength, a prompt, and what they bring and cost in numbers."""

import math
from zlib import crc32

import streamlit as st

from app import dictionaries as data
from app import export, steered
from app.behaviour import MAX_CHARACTERS
from app.cards import HANDED
from app.charts import visible
from app.compute import attempt
from app.sidebar import behaviour, current_model
from app.steered import DOWN, SNMF, UP, Recipe
from app.texts import typed
from interp.errors import InterpError
from interp.steering.changes import PLACES
from interp.steering.generation import UNSTEERED
from interp.steering.strength import TARGETS

FROM = ("two texts", "SAE latent", "SNMF feature", "neuron")

st.title("Steer")
now, cfg = behaviour(), current_model().cfg
saes = [name for name in data.offered(now.model) if not name.startswith(SNMF)]
kinds = [kind for kind in FROM if kind != "SAE latent" or saes]


def take(recipe: Recipe) -> None:
    """Fill the fields with a vector that another page handed over."""
    state = st.session_state
    if recipe.kind == "neuron":
        state.update(vector="neuron", vector_layer=recipe.layer, vector_neuron=recipe.index)
    elif recipe.source.startswith(SNMF):
        state.update(
            vector="SNMF feature", vector_layer=int(recipe.source.removeprefix(SNMF)), vector_feature=recipe.index
        )
    else:
        state.update(vector="SAE latent", vector_source=recipe.source, vector_latent=recipe.index)


def number(place, label: str, n: int, key: str, default: int = 0) -> int:
    """A field for one of n things; a number kept from another model that has more of them begins again."""
    if not 0 <= int(st.session_state.get(key, default)) < n:
        st.session_state[key] = default
    start = {} if key in st.session_state else {"value": default}
    return int(
        place.number_input(label, 0, n - 1, step=1, key=key, bind="query-params", persist_state="session", **start)
    )


def vector_form() -> Recipe:
    """Where the direction comes from."""
    if st.session_state.get("vector", kinds[0]) not in kinds:  # kept from a model that has SAEs
        del st.session_state["vector"]
    start = {} if "vector" in st.session_state else {"default": kinds[0]}
    kind = st.segmented_control(
        "Vector", kinds, key="vector", required=True, bind="query-params", persist_state="session", **start
    )
    left, right = st.columns(2)
    if kind == "two texts":
        sides = (
            (left, "Towards, one text a line", "\n".join(steered.POSITIVE), "positive"),
            (right, "Away from", "\n".join(steered.NEGATIVE), "negative"),
        )
        positive, negative = (place.text_area(label, text, key=f"vector_{side}", height=150, persist_state="session")
                              for place, label, text, side in sides)  # fmt: skip
        layer = number(left, "Layer (at its end)", cfg.n_layers, "vector_layer", cfg.n_layers // 2)
        lines = [tuple(line for line in text.splitlines() if line.strip()) for text in (positive, negative)]
        return Recipe(kind, layer=layer, positive=lines[0], negative=lines[1])
    if kind == "SAE latent":
        source = left.selectbox("Dictionary", saes, format_func=data.describe, key="vector_source", bind="query-params",
                                persist_state="session")  # fmt: skip
        size = attempt(data.dictionary, now.model, source).n_features
        return Recipe("latent", index=number(right, "Latent", size, "vector_latent"), source=source)
    layer = number(left, "Layer", cfg.n_layers, "vector_layer", cfg.n_layers // 2)
    if kind == "SNMF feature":
        feature = number(right, "Feature", data.SNMF_OPTIONS["n_features"], "vector_feature")
        return Recipe("latent", index=feature, source=f"{SNMF}{layer}")
    return Recipe(kind, layer=layer, index=number(right, "Neuron", cfg.d_mlp, "vector_neuron"))


if HANDED in st.session_state:
    take(st.session_state.pop(HANDED))
left, right = st.columns([3, 2], gap="medium")
with left:
    recipe = vector_form()
hook, size = attempt(steered.length, now.model, recipe)
try:
    likely = steered.promoted(now.model, recipe)
except InterpError:  # a hook from which the way to the logits is not fixed
    likely = {}
with left:
    first = "  ".join(map(visible, [*likely][:8])) or "not known at this hook"
    st.text(f"At {hook}, length {size:.3g}. Promotes most: {first}")
with right:
    prompt = st.text_input("Prompt", steered.PROMPT, key="steer_prompt", max_chars=MAX_CHARACTERS, bind="query-params",
                           persist_state="session")  # fmt: skip
    way = st.segmented_control("Strength", ["by divergence", "by hand"], default="by divergence", key="way", required=True,
                               bind="query-params", help="Equal effect on the next token, or an amount of one's own")  # fmt: skip
    if way == "by divergence":
        target = st.select_slider(
            "KL of the next token (nats)", TARGETS, value=steered.TARGET, key="target", bind="query-params"
        )
        alpha = None
    else:
        target = None
        alpha = st.number_input("Added (activation units)", 0.0, 1e6, 5.0, key="alpha", bind="query-params",
                                help="How far along the vector, whatever the vector's own length")  # fmt: skip
with st.expander("Drawing and concept"):
    a, b, c, d, e = st.columns(5)
    n = a.number_input("Texts", 1, steered.MAX_SAMPLES, 3, key="n_samples", bind="query-params")
    new_tokens = b.number_input("Tokens of each", 1, steered.MAX_TOKENS, 24, key="new_tokens", bind="query-params")
    temperature = c.number_input("Temperature", 0.0, 5.0, 1.0, step=0.1, key="temperature", bind="query-params")
    seed = d.number_input("Seed", 0, 2**31, 0, key="steer_seed", bind="query-params")
    positions = e.selectbox("Where", PLACES, key="positions", bind="query-params", help="At which positions")
    options = [visible(token) for token in likely]
    chosen = st.multiselect(
        "Concept: tokens whose probability is measured", options, default=options[:5], accept_new_options=True, max_selections=32,
        key=f"concept_{crc32(repr(recipe).encode())}",
        help="At first those that the vector promotes; type others as drawn, ␣ for the space in front",
    )  # fmt: skip
new = tuple(typed(token) for token in chosen if typed(token) not in likely)
ids = likely | dict(zip(new, attempt(steered.token_ids, now.model, new), strict=True))
concept = tuple(ids[typed(token)] for token in chosen)

if alpha is None:
    reached = attempt(steered.strengths, now.model, recipe, prompt, float(target), positions).set_index("sign")
    strength = tuple(None if math.isnan(a) else float(a) for a in (reached["alpha"][1], reached["alpha"][-1]))
    for column, name, sign in zip(st.columns(2), (UP, DOWN), (1, -1), strict=True):
        row = reached.loc[sign]
        if row["reached"]:
            column.metric(f"Strength {name}", f"{row['alpha']:.3g}", help="In activation units",
                          delta=f"KL {row['kl']:.3f}{'' if row['monotone'] else ', not monotone'}", delta_color="off",
                          delta_arrow="off")  # fmt: skip
        else:
            column.warning(f"No strength {name} reaches a KL of {target} here (nearest {row['kl']:.3g}): it is left out. "
                           "Choose another target or prompt, or set it by hand.")  # fmt: skip
else:
    strength = (float(alpha), float(alpha))
drawing = (positions, int(n), int(new_tokens), float(temperature), int(seed), concept)
written = attempt(steered.texts, now.model, recipe, prompt, strength, *drawing)

variants = list(dict.fromkeys(written["name"]))
for column, name in zip(st.columns(len(variants)), variants, strict=True):
    part = written[written["name"] == name]
    with column:
        st.subheader(name if name == UNSTEERED else f"steered {name}")
        for row in part.itertuples():
            with st.container(border=True):
                st.text(f"{prompt}{row.text}")
                own = "" if name == UNSTEERED else f", steered model {row.logprob_steered:.2f}"
                st.caption(f"nats per token: model {row.logprob_unsteered:.2f}{own}")
if concept:
    st.markdown("**Scores**, means over texts")
    helps = {
        "concept": "Summed probability of the concept's tokens, mean over positions", "perplexity": "Under the model left alone",
        "fluency": "1: as likely as unsteered texts", "final": "Harmonic mean of concept and fluency",
    }  # fmt: skip
    columns = {name: st.column_config.NumberColumn(name, format="%.4f", help=text) for name, text in helps.items()}
    st.dataframe(steered.scores(written), hide_index=True, key="scores", column_config={"name": "texts", **columns},
                 alt="Concept, perplexity, fluency and the harmonic mean of unsteered and steered texts")  # fmt: skip
else:
    st.info("Choose concept tokens to have the texts scored.", icon=":material/target:")
left, right = st.columns([1, 4])
with left:
    table = written.drop(columns="ids").to_csv(index=False)
    st.download_button("Texts (CSV)", table.encode(), "steered.csv", "text/csv", key="texts_csv", on_click="ignore")
with right:
    export.notebook(now, steered.code(recipe, prompt, strength, target, *drawing))
