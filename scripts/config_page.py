"""Writes the tables of docs/config.md from the comments in megdet_d2/config.py.

    python scripts/config_page.py

Only the part between the two markers is written. The text around it is written by hand.
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "megdet_d2" / "config.py"
PAGE = ROOT / "docs" / "config.md"
BEGIN = "<!-- The tables below are written by scripts/config_page.py. -->"
END = "<!-- The tables end here. -->"


def read_blocks(source: str) -> list[tuple[str, list[tuple[str, str]]]]:
    """Reads the comments of ``add_megdet_config`` and the keys that each describes.

    Args:
        source: text of config.py. A comment describes the assignments that follow it, up to the
            next comment. A section's heading begins and ends with ``---``.

    Returns:
        (comment, [(key, default), ...]) in the order of the file. Defaults are Python source.
    """
    functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    function = next(node for node in functions if node.name == "add_megdet_config")
    assigned = {
        node.lineno: (ast.unparse(node.targets[0]).removeprefix("cfg."), ast.unparse(node.value))
        for node in ast.walk(function)
        if isinstance(node, ast.Assign)
    }
    blocks: list[tuple[list[str], list[tuple[str, str]]]] = [([], [])]
    before = ""
    for number in range(function.lineno, (function.end_lineno or 0) + 1):
        line = source.splitlines()[number - 1].strip()
        if line.startswith("#"):
            if not before.startswith("#") or before.endswith("---"):
                blocks.append(([], []))
            blocks[-1][0].append(line.removeprefix("#").strip())
        elif number in assigned and assigned[number][1] != "CN()":
            blocks[-1][1].append(assigned[number])
        before = line
    return [(" ".join(comment), keys) for comment, keys in blocks if comment]


def tables(source: str) -> str:
    """Returns the Markdown that stands between the markers: a heading and a table per section."""
    parts: list[str] = []
    for comment, keys in read_blocks(source):
        if comment.startswith("---"):
            heading, _, comment = comment.strip("- ").partition(". ")
            parts.append(f"\n## {_markdown(heading.removesuffix('.'))}\n")
        if comment and not keys:
            after_table = "\n" if parts[-1].startswith("|") else ""
            parts.append(f"{after_table}{_markdown(comment.removesuffix('.'))}.\n")
        if keys:
            if not parts[-1].startswith("|"):
                parts += ["| key | default | meaning |", "|---|---|---|"]
            names = "<br>".join(f"`{key}`" for key, _ in keys)
            defaults = "<br>".join(f"`{default}`" for _, default in keys)
            parts.append(f"| {names} | {defaults} | {_markdown(comment)} |")
    return "\n".join(parts)


def _markdown(comment: str) -> str:
    """Returns a comment as Markdown: special characters escaped, pages as links, keys as code."""
    text = re.sub(r"[|*<]", r"\\\g<0>", comment)
    text = re.sub(r"docs/(\w+)\.md", r"[\1](\1.md)", text)
    return re.sub(r"(?<![`\w])[A-Z][A-Z\d]*(?:[._][A-Z][A-Z\d]*)+(?![`\w])", r"`\g<0>`", text)


def render(page: str, source: str) -> str:
    """Returns ``page`` with the tables of ``source``, the text of config.py, between its markers.

    Raises:
        ValueError: the page does not have each marker once.
    """
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{tables(source)}\n\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text(), SOURCE.read_text()))
