"""Texts of tokens and prompts as the dashboard shows them: data, never Markdown or HTML."""

import re


def plain(text: str) -> str:
    """Text as it is, where Streamlit would read Markdown."""
    return re.sub(r"([^\w\s'\"?,;/␣⏎⇥]|_)", r"\\\1", text)


def typed(text: str) -> str:
    """A token as typed, where spaces may be drawn as the tables draw them."""
    return text.replace("␣", " ").replace("⏎", "\n").replace("⇥", "\t")
