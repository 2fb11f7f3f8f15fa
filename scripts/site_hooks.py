"""Adds to the documentation site what does not lie in docs/: reference pages and linked files.

mkdocs calls the ``on_...`` functions; mkdocs.yml names this file.
"""

import inspect
import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

import megdet_d2

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
LINK = re.compile(r"(?<=\]\()(?!\w+:|[#/])([^)#\s]+)")
LANGUAGES = {".py": "python", ".sbatch": "bash", ".md": "", ".cff": "yaml"}


def reference() -> dict[str, str]:
    """Returns a page of Markdown for each room of the package that has public names.

    A room is a folder or file of the package. mkdocstrings reads the source and cannot follow a
    name that is imported when it is first used, so that each name's module is looked up here.
    """
    pages: dict[str, list[str]] = {}
    for name in sorted(megdet_d2.__all__, key=str.lower):
        thing = getattr(megdet_d2, name)
        if inspect.ismodule(thing):
            place, room = thing.__name__, thing.__name__.split(".")[1]
        elif inspect.isclass(thing) or inspect.isfunction(thing):
            place, room = f"{thing.__module__}.{thing.__qualname__}", thing.__module__.split(".")[1]
        else:
            continue
        entry = f"::: {place}\n    options:\n      heading: megdet_d2.{name}\n"
        pages.setdefault(room, [f"# {room}\n"]).append(entry)
    return {f"reference/{room}.md": "\n".join(parts) for room, parts in sorted(pages.items())}


def site_path(target: Path) -> str:
    """Returns where the site shows a file of the repository: files outside docs/ get a page."""
    if target.is_relative_to(DOCS):
        return target.relative_to(DOCS).as_posix()
    name = target.relative_to(ROOT).as_posix()
    return f"source/{name}" if name.endswith(".md") else f"source/{name}.md"


def linked_files(page: Path) -> list[Path]:
    """Returns the files outside docs/ that a page links to."""
    targets = [(page.parent / link).resolve() for link in LINK.findall(page.read_text())]
    return [path for path in targets if path.is_file() and not path.is_relative_to(DOCS)]


def relink(markdown: str, page: Path, shown_at: str) -> str:
    """Returns the Markdown of ``page`` with its links as the site needs them."""

    def target(match: re.Match[str]) -> str:
        path = (page.parent / match[1]).resolve()
        if not path.is_relative_to(ROOT):
            return match[0]
        return os.path.relpath(site_path(path), os.path.dirname(shown_at))

    return LINK.sub(target, markdown)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Adds the reference pages to the navigation."""
    assert config.nav is not None
    config.nav.append({"Reference": [{Path(page).stem: page} for page in reference()]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the reference pages, and a page for each file outside docs/ that is linked to."""
    for name, text in reference().items():
        files.append(File.generated(config, name, content=text))
    waiting = [page for page in DOCS.rglob("*.md")]
    done: set[Path] = set()
    while waiting:
        for path in set(linked_files(waiting.pop())) - done:
            done.add(path)
            name = site_path(path)
            text = path.read_text()
            if path.suffix == ".md":
                text = relink(text, path, name)
                waiting.append(path)
            else:
                language = LANGUAGES.get(path.suffix, path.suffix.removeprefix("."))
                text = f"# {path.relative_to(ROOT)}\n\n````{language}\n{text}\n````\n"
            file = File.generated(config, name, content=text)
            file.inclusion = InclusionLevel.NOT_IN_NAV
            files.append(file)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Makes links that leave docs/ point to the pages that ``on_files`` added."""
    source = DOCS / page.file.src_uri
    return relink(markdown, source, page.file.src_uri) if source.is_file() else markdown
