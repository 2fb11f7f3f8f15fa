"""The documentation site builds without a warning, and a browser shows each of its pages."""

import subprocess
import sys

import pytest

from tests.helpers.browser import faults, needs_chromium, open_browser, serve
from tests.helpers.paths import ROOT

pytest.importorskip("mkdocs", reason="the site needs requirements/setup.txt")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built as `make docs` builds it."""
    folder = tmp_path_factory.mktemp("site")
    command = f"{sys.executable} -W ignore -m mkdocs build --strict -d {folder}".split()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_public_name_has_its_place_in_the_reference(site):
    import megdet_d2

    text = "".join(page.read_text() for page in (site / "reference").glob("*.html"))
    for name in megdet_d2.__all__:
        if callable(getattr(megdet_d2, name)):
            assert f"megdet_d2.{name}" in text


@needs_chromium
def test_a_browser_shows_every_page(site, tmp_path):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 15
    with open_browser(tmp_path) as context, serve(site) as root:
        names = [page.relative_to(site).as_posix() for page in pages]
        wrong = {name: fault for name in names if (fault := faults(context, root + name, root))}
    assert not wrong


@needs_chromium
def test_the_search_finds_a_key(site, tmp_path):
    with open_browser(tmp_path) as context, serve(site) as root:
        tab = context.new_page()
        tab.goto(f"{root}index.html")
        tab.keyboard.press("/")
        tab.keyboard.type("IGNORE_PADDING")
        tab.wait_for_selector(".md-search-result__item a[href*='config.html']", timeout=30_000)


@needs_chromium
def test_a_page_that_is_wrong_is_noticed(tmp_path):
    page = tmp_path / "page.html"
    page.write_text(
        '<body style="margin: 0"><div style="width: 500px">wide</div><img src="missing.png">'
        '<script>console.error("broken"); nothing()</script><script src="http://127.0.0.1:9/a.js">'
        "</script>"
    )
    with open_browser(tmp_path / "profile") as context:
        found = " ".join(faults(context, page.as_uri(), tmp_path.as_uri()))
    for fault in ("console: broken", "error: nothing", "missing.png", "outside: http://127.0.0.1"):
        assert fault in found
    assert "110 px wider than a window of 390 px" in found and "1440 px" not in found
