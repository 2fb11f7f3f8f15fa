"""Writes one HTML page that contains its pictures and needs no network."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

# A picture (the path of a PNG file), a line of text, or a table: its rows, which need not have the
# same columns.
Content = Path | str | Sequence[Mapping[str, str]]

_LONG = 80  # characters of a cell that are a sentence

# One column on a phone, as many as fit on a wide screen. A wide table scrolls in its own frame, and
# pictures shrink to the width of their column.
_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ margin: 0 auto; padding: 1rem; max-width: 110rem; font: 1rem/1.5 system-ui, sans-serif;
       color: #1a1a1a; background: #fff; overflow-wrap: anywhere; }}
h1 {{ font-size: 1.4rem; }} h2 {{ font-size: 1.1rem; margin: 0 0 .5rem; }}
main {{ display: grid; gap: 2rem;
       grid-template-columns: repeat(auto-fit, minmax(min(100%, 34rem), 1fr)); }}
section.wide {{ grid-column: 1 / -1; }} section {{ min-width: 0; }}
img {{ display: block; max-width: 100%; height: auto; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; overflow-wrap: normal; }}
th, td {{ padding: .25rem .75rem; border-bottom: 1px solid #ddd; text-align: right;
         white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; }}
td.long {{ min-width: min(40rem, 70vw); text-align: left; white-space: normal; }}
</style>
<h1>{title}</h1>
<main>
{sections}
</main>
</html>
"""


def write_page(path: Path, title: str, sections: Sequence[tuple[str, Content]]) -> Path:
    """Writes the page and returns ``path``.

    Args:
        sections: a heading and its content each.
    """
    parts = [
        f"<section{'' if isinstance(content, Path) else ' class=wide'}>"
        f"<h2>{escape(heading)}</h2>{_render(heading, content)}</section>"
        for heading, content in sections
    ]
    path.write_text(_PAGE.format(title=escape(title), sections="\n".join(parts)), encoding="utf-8")
    return path


def _render(heading: str, content: Content) -> str:
    if isinstance(content, Path):
        data = base64.b64encode(content.read_bytes()).decode()
        return f'<img alt="{escape(heading)}" src="data:image/png;base64,{data}">'
    if isinstance(content, str):
        return f"<p>{escape(content)}</p>"
    columns = list(dict.fromkeys(key for row in content for key in row))
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(
        f"<tr>{''.join(_cell(row.get(column, '')) for column in columns)}</tr>" for row in content
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _cell(text: str) -> str:
    # Sentences are wrapped; names and numbers stay in one line.
    return f"<td{' class=long' if len(text) > _LONG else ''}>{escape(text)}</td>"
