"""Keeps the norm usable with Detectron2 before 0.6, and names the version where more is needed."""

import warnings
from collections.abc import Callable, Collection
from typing import Any, NoReturn

import detectron2


def norm_only(error: ImportError, names: Collection[str]) -> Callable[[str], Any]:
    """Returns a module's ``__getattr__`` for a Detectron2 without something that the trainer needs.

    It also warns, since the backbones, the heads and the trainer are then missing.

    Args:
        error: of the import of the trainer and the models.
        names: the public names. Those that could not be imported raise an error that says why.

    Raises:
        ImportError: the error itself, if its reason is not Detectron2.
    """
    if not (error.name or "").startswith("detectron2"):
        raise error
    # In DETECTRON2_ENV_MODULE the version is not set yet.
    version = getattr(detectron2, "__version__", "in " + ", ".join(detectron2.__path__))
    reason = (
        f"it needs Detectron2 0.6 or later, and this Detectron2 {version} lacks a part: {error}"
    )
    warnings.warn(
        f"megdet_d2 registers its norm alone, without its trainer, backbones and heads: {reason}",
        stacklevel=2,
    )

    def missing(name: str) -> NoReturn:
        if name in names:
            raise ImportError(f"megdet_d2.{name}: {reason}") from error
        raise AttributeError(f"module 'megdet_d2' has no attribute {name!r}")

    return missing
