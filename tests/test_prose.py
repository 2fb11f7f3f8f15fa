"""Docstrings start with a word that says what the thing does or is; prose avoids some phrases.

See "How to write" in CONTRIBUTING.md. Both checks read the source, so nothing is imported.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

SOURCES = sorted(
    [
        ROOT / "train_net.py",
        *(
            path
            for name in ("megdet_cli", "megdet_d2", "benchmarks", "examples", "scripts")
            for path in (ROOT / name).rglob("*.py")
        ),
    ]
)
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / ".github").rglob("*.md")]
)
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))

# First words of functions. Add yours, if it is a verb: "Hooks, and ..." is the plural of a noun.
VERBS = frozenset(
    """
    Accumulates Adds Applies Averages Begins Binds Builds Calls Checks Chooses Collects Compares
    Compiles Computes Copies Counts Cuts Defines Does Draws Ends Estimates Evaluates Finds Fits
    Fixes Fuses Gathers Gives Goes Hides Imports Keeps Kills Lengthens Lets Loads Logs Makes
    Measures Merges Moves Normalises Opens Packs Passes Predicts Prepares Prints Puts Raises Reads
    Records Reduces Refuses Registers Removes Replaces Resolves Restores Resumes Returns Runs Saves
    Seeds Selects Sends Sets Simulates Starts Stops Stores Tabulates Takes Tells Tests Times Trains
    Turns Undoes Unpacks Updates Waits Warns Writes Yields
    """.split()
)
ARTICLES = {"A", "An", "The"}
# path:name -> why its docstring may begin otherwise
EXCEPTIONS: dict[str, str] = {}

# A reader who is not at home in the project has to translate these.
PHRASES = [
    "as ever",
    "anew",
    "is told by",
    "looks after",
    "has come to",
    "of its own",
    "of their own",
    "what it is over",
    "come to no",
    "comes to no",
    "is no more",
    "nobody",
    "behind it",
    "behind them",
    "behind the script",
]
# Over the end of a line too, also of a comment or of a string in several parts.
PHRASE = re.compile(
    r"\b(" + "|".join(p.replace(" ", r"""(?:\s|#|"|')+""") for p in PHRASES) + r")\b", re.IGNORECASE
)

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def words(name: str) -> set[str]:
    """The lower-case words of an identifier: those of ``LargeKernel`` are large and kernel."""
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)}


def name_of(node: ast.expr) -> str:
    return ast.unparse(node).rpartition(".")[2]


def is_property(node: Documented) -> bool:
    decorators = getattr(node, "decorator_list", [])
    return any("property" in words(name_of(decorator)) for decorator in decorators)


def begins_badly(node: Documented, module: str) -> bool:
    """Whether the docstring of ``node`` neither begins with a verb nor with what it describes.

    A function wants a verb. A property, a class and a module are things, so an article or a word of
    their own name will do; for a class, also the name of a base.
    """
    docstring = ast.get_docstring(node)
    if docstring is None:
        return False
    first = docstring.split()[0] if docstring else ""
    if first in VERBS:  # "Copies, on the CPU, of ..." is no verb
        return False
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not is_property(node):
        return True
    if first in ARTICLES:
        return docstring.split()[1:2] == ["same"]
    if isinstance(node, ast.Module):
        own = words(module)
    elif isinstance(node, ast.ClassDef):
        own = words(node.name).union(*(words(name_of(base)) for base in node.bases))
        own |= {name_of(base).lower() for base in node.bases}
    else:
        own = words(node.name)
    plain = first.strip("`.,:;").lower()
    return plain not in own and plain.removesuffix("s") not in own


def bad_beginnings(source: str, path: str) -> Iterator[str]:
    module = path.removesuffix(".py").removesuffix("/__init__").rpartition("/")[2]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, Documented) and begins_badly(node, module):
            first = " ".join(ast.get_docstring(node).split()[:6])
            yield f"{path}:{getattr(node, 'name', module)}: {first!r}"


def bad_phrases(text: str, path: str) -> Iterator[str]:
    for match in PHRASE.finditer(text):
        yield f"{path}:{text.count(chr(10), 0, match.start()) + 1}: {match[0]!r}"


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_docstrings_begin_with_a_verb_or_with_what_they_describe():
    found = [bad for path in SOURCES for bad in bad_beginnings(path.read_text(), relative(path))]
    found = [bad for bad in found if ":".join(bad.split(":")[:2]) not in EXCEPTIONS]
    assert not found, "\n".join(["", *found])


def test_no_phrase_that_a_reader_has_to_translate():
    found = [
        bad
        for path in [*SOURCES, *PAGES, *CONFIGS]
        for bad in bad_phrases(path.read_text(), relative(path))
    ]
    assert not found, "\n".join(["", *found])


def test_each_exception_is_still_needed():
    found = {
        ":".join(bad.split(":")[:2])
        for path in SOURCES
        for bad in bad_beginnings(path.read_text(), relative(path))
    }
    assert not EXCEPTIONS.keys() - found
    assert all(EXCEPTIONS.values())


def test_verbs_look_like_verbs():
    assert all(verb.endswith("s") and verb == verb.capitalize() for verb in VERBS)


@pytest.mark.parametrize(
    "source",
    [
        'def count(images):\n    """Images of a mini-batch."""',
        'def hooks():\n    """Hooks, and the writers."""',
        'def own():\n    """Copies, on the CPU, of the buffers."""',
        'def build():\n    """The model."""',
        'def test():\n    """Detectron2\'s, with the mean."""',
        'def find():\n    """What is wrong."""',
        'def is_due():\n    """Whether a period ends."""',
        'def build():\n    """Build the model."""',
        'def f():\n    def g():\n        """Of the rows."""',
        'async def f():\n    """As Detectron2\'s."""',
        'class Layout:\n    """How many images there are."""',
        'class Layout:\n    """The same for another head."""',
        'class Layout:\n    """Several trainers."""',
        'class Layout:\n    @cached_property\n    def size(self):\n        """Until here."""',
        'class Layout:\n    def size(self):\n        """The size."""',
        '"""Hooks of the trainer."""',
        'def empty():\n    """   """',
    ],
)
def test_a_bad_beginning_is_found(source):
    assert len(list(bad_beginnings(source, "package/room/module.py"))) == 1


@pytest.mark.parametrize(
    "source",
    [
        'def build():\n    """Builds the model."""',
        "def build():\n    return 1",
        'class Layout:\n    """A layout."""',
        'class LargeKernel:\n    """Large separable kernels."""',
        'class Trainer(engine.DefaultTrainer):\n    """``DefaultTrainer`` with accumulation."""',
        'class Layout:\n    @property\n    def images(self):\n        """Images of an update."""',
        '"""Builds models."""',
        '"""The models."""',
        '"""Modules of the room."""',
    ],
)
def test_a_good_beginning_is_not(source):
    assert not list(bad_beginnings(source, "package/room/module.py"))


@pytest.mark.parametrize(
    "text",
    [
        "As ever, it loads.",
        "# it starts\n    # anew",
        '"the loop is told"\n    " by a signal"',
        "behind\nit",
    ],
)
def test_a_phrase_is_found(text):
    assert len(list(bad_phrases(text, "page.md"))) == 1


@pytest.mark.parametrize("text", ["a project of your own", "whatever", "renewal", "behind items"])
def test_other_words_are_not(text):
    assert not list(bad_phrases(text, "page.md"))
