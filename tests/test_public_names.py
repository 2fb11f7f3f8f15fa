"""Everything that a user calls is ``megdet_d2.NAME``, right after ``import megdet_d2``."""

import inspect
import re
import subprocess
import sys

import pytest

import megdet_d2
from tests.helpers.paths import ROOT
from tests.helpers.processes import environment


def run(code: str, **env: str) -> str:
    """Returns what the code prints, warnings of the ``__main__`` module included."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-W", "default::DeprecationWarning:__main__", "-c", code],
        env={**environment(), **env}, cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


@pytest.mark.parametrize("name", megdet_d2.__all__)
def test_a_public_name_explains_itself(name):
    thing = getattr(megdet_d2, name)
    assert name in dir(megdet_d2)
    if name != "__version__":
        assert inspect.getdoc(thing)
    if inspect.isclass(thing) or inspect.isfunction(thing):
        assert thing.__module__.startswith("megdet_d2.")


def test_all_is_all():
    names = megdet_d2.__all__
    assert len(names) == len(set(names))
    imported = {
        name
        for name, thing in vars(megdet_d2).items()
        if not name.startswith("_") and not inspect.ismodule(thing)
    }
    assert imported <= set(names)


def test_pages_call_only_public_names():
    """README and docs give a user no longer path than ``megdet_d2.NAME`` for a public thing."""
    public = {name for name in megdet_d2.__all__ if name != "__version__"}
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for path in re.findall(r"\bmegdet_d2(?:\.[a-z]\w*)+(?:\.\w+)", page.read_text()):
            module, _, name = path.rpartition(".")
            assert name not in public or module == "megdet_d2", f"{page.name}: {path}"


def test_the_engine_and_its_old_modules_are_there_after_import():
    printed = run(
        "import megdet_d2\n"
        "megdet_d2.engine.prepare_config\n"
        "old = megdet_d2.engine.statistics.average_statistics\n"
        "assert old is megdet_d2.average_statistics\n"
        "assert megdet_d2.analysis.noise.GradientNoise is megdet_d2.GradientNoise\n"
    )
    for line, module in ((3, "norm.running_statistics"), (5, "gradient_noise.estimate")):
        warning = rf"<string>:{line}: DeprecationWarning: .* now megdet_d2.{module}"
        assert re.search(warning, printed)


@pytest.mark.parametrize(
    "first",
    [
        "import detectron2",
        "from detectron2.engine import DefaultTrainer",
        "from detectron2 import model_zoo",
        "from detectron2.layers import get_norm",
    ],
)
def test_detectron2_may_import_the_plugin(first):
    """Detectron2 imports the plugin before it is itself imported to the end."""
    run(
        f"{first}\n"
        "import detectron2.layers, sys\n"
        "assert type(detectron2.layers.get_norm('CGBN', 3)).__name__ == 'CGBN'\n"
        "assert sys.modules['megdet_d2'].Trainer\n",
        DETECTRON2_ENV_MODULE="megdet_d2.env",
    )
