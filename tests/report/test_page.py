"""Tests the page of the report: complete in one file, readable in a browser."""

import base64
import re

from megdet_d2.cli import main
from megdet_d2.report.page import write_page
from tests.helpers.browser import faults, needs_chromium, open_browser
from tests.helpers.runs import needs_demo_extra

pytestmark = needs_demo_extra


def test_the_page_holds_everything_itself(run):
    main(["report", str(run), "--images", "1"])
    page = (run / "report.html").read_text()
    pictures = re.findall(r'<img [^>]*src="([^"]+)"', page)
    assert len(pictures) == 4 and all(p.startswith("data:image/png;base64,") for p in pictures)
    decoded = base64.b64decode(pictures[-1].partition(",")[2])
    assert decoded == (run / "detections.png").read_bytes()
    # It loads no script, style, font or picture from elsewhere.
    assert not re.findall(r"https?://|<script|<link|@import|url\(", page)
    assert 'name="viewport"' in page and "max-width: 100%" in page
    assert "<td>20.5</td><td>40.0</td>" in page


@needs_chromium
def test_a_browser_shows_the_page(run, tmp_path):
    main(["report", str(run), "--images", "1"])
    with open_browser(tmp_path / "profile") as context:
        assert not faults(context, (run / "report.html").as_uri())


def test_the_pages_text_is_escaped(tmp_path):
    path = write_page(tmp_path / "p.html", "<a>", [("<b>", [{"<c>": "<d>"}]), ("e", "<f>")])
    text = path.read_text()
    assert not re.findall(r"<[abcdf]>", text) and "&lt;d&gt;" in text
