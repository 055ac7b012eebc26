"""The report: one page that holds everything, fetches nothing and cannot be broken by what a prompt says."""

import dataclasses
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from interp import PromptPairs, discover
from interp.report import render
from tests.small_pairs import small_pairs

EVIL = ("<script>alert(1)</script>", '"quoted"', " a&b", "</body>", " 'x'", "\n")
VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """Tags with their attributes, text outside scripts and styles, and which tags were left open."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.text = ""
        self.plots = self.drawn = 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        kinds = (dict(attrs).get("class") or "").split()
        self.plots += "plotly-graph-div" in kinds
        self.drawn += "js-plotly-plot" in kinds

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        last = self.open.pop()
        assert last == tag, f"</{tag}> closes <{last}>"

    def handle_data(self, data):
        if not {"script", "style"} & set(self.open):
            self.text += data

    def count(self, tag: str, **attributes) -> int:
        return sum(t == tag and all(a.get(k) == v for k, v in attributes.items()) for t, a in self.tags)


@pytest.fixture(scope="module")
def found(tiny):
    pairs = PromptPairs.from_text(
        tiny("gpt2"), clean=["w1 w2 w3 w4", "w2 w9 w3 w4"], corrupt=["w1 w5 w3 w4", "w2 w8 w3 w4"],
        answers=[" w7", " w6"], wrong_answers=[" w8", " w5"], name="toy", corruption="word",
    )  # fmt: skip
    return discover(tiny("gpt2"), pairs)


@pytest.fixture(scope="module")
def page(found) -> Page:
    return Page(render(found))


def test_the_page_fetches_nothing(found, page):
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "base", "object"), tag
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            assert not (attributes.get(name) or "").startswith(("http", "//")), (tag, attributes)
        assert not (tag == "script" and attributes.get("src"))
    style = render(found).split("<style>")[1].split("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style


def test_the_page_is_well_formed(page):
    assert page.open == []
    assert page.count("h1") == 1
    assert page.count("html", lang="en") == 1
    assert page.count("meta", charset="utf-8") == 1


def test_the_page_holds_the_ranking_and_how_it_was_made(found, page):
    for row in found.ranking.head(12).itertuples():
        assert row.node in page.text
        assert f"{row.effect:+.3f}" in page.text
    for words in ("gpt2 on toy", "logit_diff", "logits", "corruption: word", found.attrs["versions"], found.attrs["sign"],
                  "corrupt prompt is run and clean values are patched in", "corrupt ablation"):  # fmt: skip
        assert words in page.text, words


def test_the_first_pair_is_shown_with_its_answer(page):
    for words in ("␣w2", "␣w5", "␣w7", "␣w8", "w1"):
        assert words in page.text
    assert page.count("span", **{"class": "differs"}) == 2


def test_every_figure_is_there(found, page):
    maps = sum(name in found.effects for name in ("resid_pre", "resid_mid", "attn_out", "mlp_out"))
    assert page.plots == maps + 4 == 8  # ranking, curve, all heads at once, strongest heads by position


def test_what_a_prompt_says_stays_text(tiny):
    pairs = small_pairs(differ=(1,), name="<script>task</script>")
    pairs = dataclasses.replace(pairs, token_strings=(EVIL, EVIL), corruption="<b>&")
    found = discover(tiny("gpt2"), pairs)
    found = dataclasses.replace(
        found, corrupt_strings=EVIL, answer_strings=("<i>", " </code>"), wrong_strings=("<u>",), notes=["<s>note"]
    )
    evil, plain = Page(render(found)), Page(render(discover(tiny("gpt2"), small_pairs(differ=(1,)))))
    assert evil.open == []
    for token in ("<script>alert(1)</script>", '"quoted"', "␣a&b", "</body>", "⏎", "<i>", "␣</code>", "<u>", "<s>note"):
        assert token in evil.text, token
    for tag in ("script", "b", "i", "u", "s", "body"):
        assert evil.count(tag) == plain.count(tag), tag
    assert "alert(1)</script>" not in render(found).replace("alert(1)&lt;/script&gt;", "")


def test_pairs_without_text_or_wrong_answers_have_a_page(tiny):
    pairs = small_pairs(token_strings=None, wrong_answers=None, metric="log_probability")
    page = Page(render(discover(tiny("pythia"), pairs, direction="noise", top_heads=0)))
    assert page.plots == 6
    assert "First pair" not in page.text
    assert "clean prompt is run and corrupt values are patched in" in page.text


def test_the_report_is_written_whole_or_not_at_all(found, tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    assert found.report(path) == path
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    path.write_text("old")

    def fails(*args):
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr("os.replace", fails)
        with pytest.raises(OSError, match="disk full"):
            found.report(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.browser
def test_a_browser_draws_every_figure(found, tmp_path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine")
    path = found.report(tmp_path / "report.html")
    flags = (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", "--virtual-time-budget=8000", "--dump-dom",
    )  # fmt: skip
    result = subprocess.run(
        [browser, *flags, f"--user-data-dir={tmp_path / 'profile'}", path.as_uri()],
        capture_output=True, text=True, timeout=120, env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}, check=True,
    )  # fmt: skip
    drawn = Drawn(result.stdout)
    assert drawn.plots == drawn.with_svg == 8
    assert drawn.bars == 15


class Drawn(HTMLParser):
    """Plots in a page after its scripts ran: how many there are, and how many have a drawing in them."""

    def __init__(self, text: str):
        super().__init__()
        self.plots = self.with_svg = self.bars = 0
        self.empty = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        kinds = (dict(attrs).get("class") or "").split()
        if "js-plotly-plot" in kinds:
            self.plots, self.empty = self.plots + 1, True
        if tag == "svg" and "main-svg" in kinds and self.empty:
            self.with_svg, self.empty = self.with_svg + 1, False
        self.bars += tag == "g" and "point" in kinds


def test_the_same_discovery_gives_the_same_page(found):
    assert render(found) == render(found)


def test_the_report_needs_no_folder_of_its_own(found, tmp_path):
    found.report(str(tmp_path / "report.html"))
    assert [p.name for p in Path(tmp_path).iterdir()] == ["report.html"]


def test_an_approximate_map_says_how_far_it_is_off(tiny):
    exact, page = (render(discover(tiny("gpt2"), small_pairs(), rules=rules)) for rules in (None, "secant"))
    assert "How far to trust this map" not in exact
    assert "Exact activation patching, direction denoise" in Page(exact).text
    assert "estimated patched − corrupt" not in exact
    text = Page(page).text
    assert "How far to trust this map" in text
    assert "estimates from one backward pass by the rules secant" in text
    assert "agreement with exact patching on all" in text
    assert "relative error" in text
    assert "Activation patching, estimated from one backward pass, direction denoise" in text
    assert "Exact activation patching" not in text
    assert "estimated patched" in page
