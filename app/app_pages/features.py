"""Latents of dictionaries: which there are, where they fire, what they write, and the way to steer with one."""

import streamlit as st

from app import dictionaries as data
from app import export, uploads
from app.cards import (
    chosen_row,
    context_table,
    effect_tables,
    latent_of,
    prompt_choice,
    steer_button,
    token_bars,
)
from app.charts import visible
from app.compute import attempt
from app.notebooks import latent_code
from app.selection import select, selection
from app.sidebar import behaviour, current_model
from app.steered import SNMF, Recipe
from app.texts import plain
from interp.errors import InterpError
from interp.features.zf import zf_plot

SHOWN = 500
ORDERS = {"strongest on the prompt": "prompt", "strongest in the text": "strongest", "most often": "density", "rarest": "density",
          "number": "latent"}  # fmt: skip

st.title("Features")
now, cfg = behaviour(), current_model().cfg
first, second, third = st.columns([3, 2, 2])
fourth, fifth = st.columns([5, 2])
source = first.selectbox("Dictionary", data.offered(now.model), format_func=data.describe, key="source", bind="query-params",
                         help="Autoencoders of this model, or semi-NMF of a layer's neurons, fitted here")  # fmt: skip
order = fifth.selectbox("Order", list(ORDERS), key="order", bind="query-params")
wanted = second.text_input(
    "Token contains", key="find", max_chars=40, bind="query-params", help="The token of the first context"
)
n_texts = third.select_slider("Texts looked at", data.TEXTS, value=100, key="texts", bind="query-params")
with fourth:
    prompt = prompt_choice(attempt(data.prompt_texts, now), key="prompt")
found = attempt(data.dictionary, now.model, source)
if source.startswith(uploads.PREFIX):
    trained_on = found.metadata.get("model_name")
    st.caption(f"Uploaded; by its own account trained on {plain(str(trained_on or 'a model that it does not name'))}.")
table = attempt(data.latent_table, now, prompt, source, n_texts)
hit = table[table["token"].str.contains(visible(wanted), case=False, regex=False)] if wanted else table
hit = hit.sort_values(ORDERS[order], ascending=order in ("rarest", "number"), kind="stable").reset_index(drop=True)
shown = hit.head(SHOWN)
KEY = f"latents|{source}|{order}|{wanted}|{n_texts}|{prompt}"  # another table is another widget: its clicks are not this one's


def take_row() -> None:
    """The clicked row's latent is the one selected."""
    latent = chosen_row(st.session_state.get(KEY), shown["latent"].tolist())
    if latent is not None:
        select(f"latent@{latent}")


def take_number() -> None:
    """The typed latent is the one selected."""
    select(f"latent@{st.session_state['latent']}")


@st.fragment
def panel() -> None:
    """The table and the card of the latent that is selected in it."""
    st.caption(f"Showing {len(shown):,} of {len(hit):,} latents{' with this token' if wanted else ''}; {len(table):,} of "
               f"{found.n_features:,} fire in these texts. Click a row.")  # fmt: skip
    st.dataframe(
        shown, hide_index=True, key=KEY, on_select=take_row, selection_mode="single-row", height=250, alt="Latents that fire",
        column_config={
            "latent": st.column_config.NumberColumn("latent", format="%d"),
            "token": st.column_config.TextColumn("token", help="That it fires on most strongly in the texts"),
            "strongest": st.column_config.NumberColumn("strongest", format="%.2f", help="Largest activation in the texts"),
            "density": st.column_config.NumberColumn("density", format="percent", help="Share of tokens on which it fires"),
            "prompt": st.column_config.NumberColumn("on the prompt", format="%.2f", help="Largest, behind the first token"),
        },
    )  # fmt: skip
    latent = latent_of(selection().primary, found.n_features)
    if latent is not None:
        card(latent)
    elif len(shown):
        card(int(shown["latent"].iloc[0]))
    else:
        st.info("No latent's token contains this. Type less of it, or look at more texts.", icon=":material/search:")


def card(latent: int) -> None:
    """One latent: contexts, tokens, the prompt."""
    st.session_state["latent"] = latent  # the selection is what counts; the field follows
    name, number, button = st.columns([3, 2, 2], vertical_alignment="bottom")
    name.subheader(f"{'Feature' if source.startswith(SNMF) else 'Latent'} {latent}")
    number.number_input("Go to", 0, found.n_features - 1, step=1, key="latent", on_change=take_number)
    with button:
        steer_button(Recipe("latent", index=latent, source=source), key="steer_with")
    rows = attempt(data.contexts_of, now.model, source, n_texts, latent)
    if len(rows):
        st.markdown(f"**Strongest contexts**, one for each text; fires on {rows['density'].iloc[0]:.2%} of tokens")
        context_table(rows, key=f"contexts_{latent}", alt="The strongest contexts, firing token marked")
    else:
        st.info(
            f"It fires nowhere in {n_texts} texts. Look at more of them, or at another latent.",
            icon=":material/blur_off:",
        )
    left, right = st.columns(2, gap="medium")
    with left:
        st.markdown("**Tokens** by its direct effect: logits per unit of activation, up to the final norm's scale")
        writes = True
        try:
            effect_tables(data.effects(now.model, source, latent), key=f"effects_{latent}")
        except InterpError as error:
            writes = False
            st.info(plain(str(error)), icon=":material/info:")
    with right:
        tokens, codes = data.prompt_codes(now, prompt, source)
        st.markdown(
            f"**On the prompt**: largest {codes[:, latent].max():.2f}. The first token's is of a size of its own."
        )
        st.echarts_chart(token_bars(tokens, codes[:, latent], unit="activation"), key="on_prompt", height=250,
                         alt=f"Activation of latent {latent} at each token of the prompt")  # fmt: skip
    with st.expander("Download", icon=":material/download:"):
        for which, name, label in ((hit, "latents", "Latents"), (rows, f"latent-{latent}-contexts", "Contexts")):
            with st.container(horizontal=True):
                export.table(which, name=name, label=label)
        export.notebook(now, latent_code(source, n_texts, latent, writes=writes))


def opened() -> None:
    """Callback of the file field: the uploaded SAE is the one looked at, or one sentence says why not."""
    st.session_state.pop("upload_error", None)
    if files := st.session_state.get("sae_files"):
        try:
            st.session_state["source"] = uploads.take(now.model, files)
        except InterpError as error:
            st.session_state["upload_error"] = str(error)


panel()
st.divider()
with st.expander("Open an SAE", icon=":material/folder_open:", expanded="upload_error" in st.session_state):
    st.file_uploader(f"{' and '.join(uploads.NEEDED)}, as SAELens saves them", ["json", "safetensors"], key="sae_files",
                     accept_multiple_files=True, on_change=opened, max_upload_size=max(uploads.LIMITS.values()),
                     help="Choose both together; activation_scaler.json too where there is one. Kept on this machine "
                          "until the dashboard ends")  # fmt: skip
    if problem := st.session_state.get("upload_error"):
        st.error(plain(problem), icon=":material/error:")
if source.startswith(SNMF):
    stable = found.stability_.mean()
    st.caption(f"Semi-NMF of {found.source_['n_tokens']:,} tokens: {found.n_features} features of few neurons, relative loss "
               f"{found.relative_loss_:.2f}, mean stability {float(stable):.2f} (cosine with another start's).")  # fmt: skip
elif st.toggle("ZF plot: is the code as long as the activation?", key="zf", bind="query-params"):
    points, width = attempt(data.zf, now.model, source)
    figure = zf_plot(points, d=width, title=f"{data.describe(source)}, {len(points):,} tokens")
    st.plotly_chart(
        figure, key="zf_plot", theme=None, alt="Length of each token's code over the length of its activation"
    )
    st.download_button("Figure (HTML)", lambda: figure.to_html(include_plotlyjs=True).encode(), "zf.html", "text/html",
                       key="zf_html", on_click="ignore")  # fmt: skip
