"""Checks that files import only from their floor or below; see docs/architecture.md."""

import ast
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

PACKAGE = ROOT / "megdet_d2"

# From the lowest floor up. A prefix names a folder; the longest one decides.
FLOORS = {
    "_moved": 0,
    "_older_detectron2": 3,
    "_older_torch": 0,
    "_version": 0,
    "norm": 0,
    "schedule": 0,
    "norm.configure": 1,
    "norm.registry": 1,
    "norm.retinanet": 1,
    "norm.running_statistics": 1,
    "schedule.build": 1,
    "config": 1,
    "memory": 1,
    "model_zoo": 1,
    "modeling": 1,
    "optim": 1,
    "data": 1,
    "engine": 2,
    "ablation": 3,
    "check": 3,
    "ensemble": 3,
    "gradient_noise": 3,
    "planner": 3,
    "report": 3,
    "cli": 3,
    "env": 3,
    "__init__": 3,
}
# These need no Detectron2 and no config.
PLAIN = [
    "norm/groups.py",
    "norm/functional.py",
    "norm/collective.py",
    "norm/aten.py",
    "norm/padding.py",
    "norm/batch_norm.py",
    "norm/convert.py",
    *(f"norm/kernels/{path.name}" for path in (PACKAGE / "norm/kernels").glob("*.py")),
    "schedule/phases.py",
    "schedule/scaling.py",
]
FILES = sorted(PACKAGE.rglob("*.py"))


def floor(module: str) -> int:
    name = module.removeprefix("megdet_d2").lstrip(".") or "__init__"
    while name not in FLOORS:
        assert "." in name, (
            f"{module} stands on no floor: add it to FLOORS and the architecture page"
        )
        name = name.rpartition(".")[0]
    return FLOORS[name]


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path):
    """Yields the absolute names of the modules that a file imports, also inside functions."""
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                candidate = PACKAGE.parent / Path(*stem.split("."), alias.name)
                is_module = candidate.with_suffix(".py").exists() or candidate.is_dir()
                yield f"{stem}.{alias.name}" if is_module else stem


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_point_down(path):
    here = floor(module_name(path))
    for name in imports(path):
        if name.startswith("megdet_d2") and module_name(path) != "megdet_d2":
            assert floor(name) <= here, f"{module_name(path)} imports {name}, from a floor above"


@pytest.mark.parametrize("path", PLAIN)
def test_norm_and_schedule_need_no_detectron2(path):
    assert not [
        name for name in imports(PACKAGE / path) if "detectron2" in name or "fvcore" in name
    ]


# --- the tests themselves ------------------------------------------------------------------------

TESTS = ROOT / "tests"
TEST_FILES = sorted(TESTS.rglob("*.py"))


def imported_tests(source: str) -> list[str]:
    """Returns the modules of tests/ that a source imports, other than helpers."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            found.append("." * node.level + (node.module or ""))  # relative: of tests/ in any case
        elif isinstance(node, ast.ImportFrom):
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    ours = [name for name in found if name.startswith(".") or name.split(".")[0] == "tests"]
    return [name for name in ours if not name.startswith("tests.helpers.")]


@pytest.mark.parametrize("path", TEST_FILES, ids=lambda path: str(path.relative_to(TESTS)))
def test_no_test_file_imports_another(path):
    found = imported_tests(path.read_text())
    assert not found, f"{found}: move what both need to tests/helpers/"


@pytest.mark.parametrize(
    "line",
    [
        "from tests.norm.test_registry import x",
        "from tests.norm import test_registry",
        "import tests.test_memory",
        "from tests import helpers",
        "from . import test_memory",
        "from ..norm.test_registry import x",
        "def f():\n    from tests.conftest import x",
    ],
)
def test_an_import_of_a_test_file_is_found(line):
    assert imported_tests(line)


def test_helpers_may_be_imported():
    assert not imported_tests("from tests.helpers import paths\nimport tests.helpers.paths as p")
    assert not imported_tests("from tests.helpers.paths import ROOT\nimport torch")


def test_folders_of_tests_are_those_of_the_package():
    folders = {path.parent.relative_to(TESTS) for path in TEST_FILES} - {Path("helpers")}
    ours = {path.parent.relative_to(PACKAGE) for path in FILES}
    assert folders <= ours
    helpers = list((TESTS / "helpers").glob("test_*"))
    assert not helpers, f"{helpers}: a test lies beside the code that it tests"


@pytest.mark.parametrize("name", ["TINY", "tiny_config", "build"])
def test_one_of_each_in_the_suite(name):
    made = []
    for path in TEST_FILES:
        for node in ast.parse(path.read_text()).body:
            targets = getattr(node, "targets", [])
            names = [getattr(node, "name", None), *(getattr(each, "id", None) for each in targets)]
            made += [str(path.relative_to(TESTS))] * (name in names)
    assert len(made) == 1 and made[0].startswith("helpers/"), made


# --- the package as a whole ----------------------------------------------------------------------


def test_setup_py_is_a_shim():
    setup = (ROOT / "setup.py").read_text()
    assert "torch" not in setup and len(setup.splitlines()) <= 4
    version = {}
    exec((PACKAGE / "_version.py").read_text(), version)
    assert f"## {version['__version__']}" in (ROOT / "CHANGELOG.md").read_text()
