"""The form that every page shares: which model, which behaviour. What it says stands in the address bar as well."""

import streamlit as st

from app.behaviour import MAX_CHARACTERS, MAX_PROMPTS, OWN, Behaviour
from app.locked import LockedModel, folders, locked_model
from app.selection import selection
from app.texts import plain
from interp import bundled_models
from interp.errors import InterpError
from interp.tasks.named import TASKS

KEY = "behaviour"


def behaviour() -> Behaviour:
    """What this session looks at: that of the address when it opens."""
    if KEY not in st.session_state:
        st.session_state[KEY] = Behaviour.from_query(dict(st.query_params))
    return st.session_state[KEY]


def set_behaviour(new: Behaviour) -> None:
    """Look at something else, here and in the address."""
    old = behaviour()
    st.session_state[KEY] = new
    for name in old.to_query():
        if name in st.query_params:
            del st.query_params[name]
    _to_address(new)


def _to_address(current: Behaviour) -> None:
    wanted = current.to_query() | selection().to_query()
    if any(st.query_params.get(name) != value for name, value in wanted.items()):
        st.query_params.update(wanted)


def current_model() -> LockedModel:
    """The model of the behaviour; stops the page with one sentence where it cannot be loaded."""
    try:
        return locked_model(behaviour().model)
    except InterpError as error:
        stop(error)


def stop(error: Exception) -> None:
    """Say what went wrong in one sentence, and draw no more of the page."""
    st.error(plain(str(error)), icon=":material/error:")
    st.stop()


def draw_sidebar() -> None:
    """The form. Nothing is computed until it is submitted."""
    now = behaviour()
    _to_address(now)
    with st.sidebar:
        models = list(dict.fromkeys([*bundled_models(), *(str(f) for f in folders()), now.model]))
        with st.form("behaviour_form", border=False):
            model = st.selectbox("Model", models, index=models.index(now.model), key="form_model")
            tasks = [*TASKS, OWN]
            task = st.selectbox("Behaviour", tasks, index=tasks.index(now.task), key="form_task",
                                help="A bundled task, or two prompts of your own")  # fmt: skip
            n = st.number_input("Pairs of the task", 1, MAX_PROMPTS, now.n, key="form_n")
            with st.expander("My own prompts", expanded=now.task == OWN):
                clean = st.text_area("Prompt", now.clean, max_chars=MAX_CHARACTERS, key="form_clean")
                corrupt = st.text_area("Contrast prompt", now.corrupt, max_chars=MAX_CHARACTERS, key="form_corrupt",
                                       help="The same with one thing changed, of equally many tokens")  # fmt: skip
                answer = st.text_input(
                    "Answer", now.answer, key="form_answer", help="As typed after the prompt: ' Mary'"
                )
                wrong = st.text_input("Wrong answer", now.wrong, key="form_wrong")
            if st.form_submit_button("Look", type="primary", width="stretch", key="form_submit"):
                wanted = Behaviour(model, task, int(n), now.seed, clean, corrupt, answer, wrong)
                try:
                    set_behaviour(wanted.checked())
                except InterpError as error:
                    st.error(plain(str(error)), icon=":material/error:")
                else:
                    st.rerun()  # so that the form itself shows what is looked at now
