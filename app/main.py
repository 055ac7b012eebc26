"""The dashboard: `interp app`, or `streamlit run app/main.py`. Pages are listed in `app.registry`; this file only frames them."""

import sys
from pathlib import Path

# Streamlit puts this file's own folder on the path; the package `app` is the folder itself, in a clone and in a wheel.
sys.path[:0] = [root for root in [str(Path(__file__).resolve().parents[1])] if root not in sys.path]

import streamlit as st  # noqa: E402

from app.registry import PAGES, navigation  # noqa: E402
from app.sidebar import draw_sidebar  # noqa: E402

st.set_page_config(page_title="interp", page_icon=":material/network_node:", layout="wide")
page = navigation(PAGES)
draw_sidebar()
page.run()
