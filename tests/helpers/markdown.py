"""The fenced blocks of a Markdown page."""

import re
from dataclasses import dataclass
from pathlib import Path

NOT_RUN = re.compile(r"<!-- not run: (.+) -->")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: the page.
        line: the number of its first line, after the fence.
        language: the word after the fence.
        code: its lines.
        not_run: the reason in a comment ``<!-- not run: reason -->`` right above it, or "".
    """

    page: Path
    line: int
    language: str
    code: str
    not_run: str

    def __str__(self) -> str:
        return f"{self.page.stem}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """Returns the fenced blocks of a page, in order."""
    found: list[Block] = []
    lines = page.read_text().splitlines()
    start, above = None, ""
    for number, line in enumerate(lines, 1):
        if not line.lstrip().startswith("```"):
            if start is None and line.strip():
                above = line.strip()
        elif start is None:
            start = number
        else:
            language = lines[start - 1].strip().removeprefix("```")
            reason = NOT_RUN.fullmatch(above)
            code = "\n".join(lines[start : number - 1]) + "\n"
            found.append(Block(page, start + 1, language, code, reason[1] if reason else ""))
            start, above = None, ""
    assert start is None, f"{page}: the block that begins in line {start} does not end"
    return found
