"""Keeps the names of earlier versions working; each use warns with the new name."""

import importlib
import importlib.abc
import importlib.util
import sys
import warnings
from collections.abc import Callable
from typing import Any

MODULES = {
    "analysis.ablate": "ablation.command",
    "analysis.cluster": "ablation.cluster",
    "analysis.collate": "ablation.results",
    "analysis.compare": "report.plots",
    "analysis.ensemble": "ensemble.command",
    "analysis.figures": "report.style",
    "analysis.fusion": "ensemble.fusion",
    "analysis.noise": "gradient_noise.estimate",
    "analysis.page": "report.page",
    "analysis.reduction": "ablation.reduced",
    "analysis.report": "report.command",
    "analysis.rows": "ablation.rows",
    "analysis.runs": "report.run",
    "analysis.training": "ablation.local",
    "analysis.variance": "gradient_noise.command",
    "engine.agreement": "engine.same_config",
    "engine.guard": "engine.divergence",
    "engine.machines": "engine.rendezvous",
    "engine.preempt": "engine.signals",
    "engine.prepare": "engine.check_config",
    "engine.sampler": "data.stream",
    "engine.samples": "engine.sample_ratio",
    "engine.statistics": "norm.running_statistics",
}
"""Module names below ``megdet_d2``: the old one and the new one."""


def install() -> None:
    """Lets ``import`` find the modules of ``MODULES`` under their old names."""
    if not any(isinstance(finder, _OldNames) for finder in sys.meta_path):
        sys.meta_path.append(_OldNames())


def renamed(module: str, **names: str) -> Callable[[str], Any]:
    """Returns the ``__getattr__`` of a module in which names have changed.

    Args:
        module: the module's ``__name__``.
        names: old names, each with the new one: a name in the same module, or with dots the full
            name in another.
    """

    def find(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        home, _, new = names[name].rpartition(".")
        home = home or module
        _warn(f"{module}.{name}", f"{home}.{new}", stacklevel=3)
        return getattr(importlib.import_module(home), new)

    return find


def _warn(old: str, new: str, stacklevel: int) -> None:
    warnings.warn(f"{old} is now {new}", DeprecationWarning, stacklevel=stacklevel + 1)


class _OldNames(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname, path=None, target=None):
        package, _, name = fullname.partition(".")
        if package == "megdet_d2" and (name in MODULES or name == "analysis"):
            return importlib.util.spec_from_loader(fullname, self, is_package=name == "analysis")
        return None

    def exec_module(self, module) -> None:
        name = module.__name__.partition(".")[2]
        if name == "analysis":  # only the package of the others
            return
        new = f"megdet_d2.{MODULES[name]}"
        _warn(module.__name__, new, stacklevel=2)
        module.__getattr__ = lambda attribute: getattr(importlib.import_module(new), attribute)
