"""Keeps the names of earlier versions working; each use warns with the new name."""

import functools
import importlib
import importlib.abc
import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
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
    "engine.resuming": "engine.trainer",
    "engine.samples": "engine.sample_ratio",
    "engine.statistics": "norm.running_statistics",
}
"""Module names below ``megdet_d2``: the old one and the new one."""


def install() -> None:
    """Lets ``import`` find the modules of ``MODULES`` under their old names."""
    if not any(isinstance(finder, _OldNames) for finder in sys.meta_path):
        sys.meta_path.append(_OldNames())


def moved(package: str) -> Callable[[str], Any]:
    """Returns the ``__getattr__`` of a package that modules have left.

    It makes ``megdet_d2.engine.guard`` work without an import of that module.

    Args:
        package: the package's ``__name__``.
    """

    def find(name: str) -> Any:
        path = f"{package}.{name}"
        if not _is_old(path):
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return importlib.import_module(path)

    return find


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
        _warn(f"{module}.{name}", f"{home}.{new}")
        return getattr(importlib.import_module(home), new)

    return find


def _is_old(path: str) -> bool:
    package, _, name = path.partition(".")
    return package == "megdet_d2" and (name in MODULES or name == "analysis")


def _warn(old: str, new: str) -> None:
    # Python shows a DeprecationWarning only where it points to the user's script. The import
    # system puts a number of frames in between that varies, so no stacklevel fits.
    frame = sys._getframe(1)
    while frame.f_back is not None and _is_machinery(frame.f_code.co_filename):
        frame = frame.f_back
    warnings.warn_explicit(
        f"{old} is now {new}",
        DeprecationWarning,
        frame.f_code.co_filename,
        frame.f_lineno,
        module=frame.f_globals.get("__name__"),
        registry=frame.f_globals.setdefault("__warningregistry__", {}),
    )


def _is_machinery(filename: str) -> bool:
    return filename == __file__ or "importlib" in filename


class _OldNames(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        if not _is_old(fullname):
            return None
        is_package = fullname == "megdet_d2.analysis"
        return importlib.util.spec_from_loader(fullname, self, is_package=is_package)

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__.partition(".")[2]
        if name == "analysis":  # only the package of the others
            vars(module)["__getattr__"] = moved(module.__name__)
            return
        new = f"megdet_d2.{MODULES[name]}"
        _warn(module.__name__, new)
        vars(module)["__getattr__"] = functools.partial(_get_from, new)


def _get_from(module: str, attribute: str) -> Any:
    return getattr(importlib.import_module(module), attribute)
