"""The pages of the dashboard, in the order of a visit. A new page is a file in `app_pages/` and a line here."""

from dataclasses import dataclass
from pathlib import Path

import streamlit as st

FOLDER = Path(__file__).parent / "app_pages"


@dataclass(frozen=True)
class Entry:
    """One page: its file, what the menu calls it, its icon (Material Symbols), and what it is for in one line."""

    name: str
    title: str
    icon: str
    help: str

    @property
    def path(self) -> Path:
        return FOLDER / f"{self.name}.py"


PAGES = (
    Entry("prompt", "Prompt", "text_fields", "What the model reads and predicts, layer by layer"),
    Entry("patch", "Patch", "grid_on", "Which places carry the answer: exact and approximate maps"),
    Entry("circuit", "Circuit", "network_node", "How they connect; ablate what you select"),
    Entry("features", "Features", "blur_on", "Latents of dictionaries: contexts, tokens, steering"),
    Entry("neurons", "Neurons", "scatter_plot", "Neurons by the tokens that they read and write; clamp them"),
    Entry("steer", "Steer", "tune", "Texts with and without a change, side by side"),
    Entry("runs", "Runs", "history", "Jobs and their results"),
)


def navigation(pages: tuple[Entry, ...]):
    """Streamlit's menu of these pages; the first is the one that opens."""
    return st.navigation(
        [
            st.Page(p.path, title=p.title, icon=f":material/{p.icon}:", url_path=p.name, default=p is pages[0], help=p.help)
            for p in pages
        ]
    )  # fmt: skip
