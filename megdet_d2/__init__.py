"""MegDet for Detectron2: large mini-batch detector training (Peng et al., CVPR 2018).

Importing the package registers ``NORM: "CGBN"`` and the appendix's backbones and heads in
Detectron2, by their names; nothing else changes there.
"""

try:
    import cv2  # noqa: F401
    import detectron2  # noqa: F401
    import torch  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"megdet_d2 needs torch, Detectron2 and OpenCV, and found no {error.name!r}. Install "
        "what is missing:\n"
        "  torch, torchvision:  https://pytorch.org/get-started/locally\n"
        "  Detectron2:          pip install --no-build-isolation "
        "'git+https://github.com/facebookresearch/detectron2.git'\n"
        "  OpenCV:              pip install opencv-python\n"
        "or, in a checkout of megdet_d2, run `make setup`, which installs them all into .venv."
    ) from error

from . import _moved
from . import modeling as _modeling  # noqa: F401
from ._version import __version__
from .config import add_megdet_config
from .norm import registry as _registry
from .norm.batch_norm import CrossGPUBatchNorm
from .norm.configure import configure_cgbn, set_bn_size
from .norm.convert import convert_cgbn, revert_cgbn
from .norm.registry import NORM_REGISTRY
from .schedule.build import build_lr_scheduler, scale_config

__all__ = [
    "NORM_REGISTRY",
    "CrossGPUBatchNorm",
    "Trainer",
    "__version__",
    "add_megdet_config",
    "build_lr_scheduler",
    "configure_cgbn",
    "convert_cgbn",
    "revert_cgbn",
    "scale_config",
    "set_bn_size",
]

_moved.install()
_registry.install()


def __getattr__(name: str):
    # detectron2.engine takes seconds to import; a project that only wants the norm never pays for
    # it.
    if name == "Trainer":
        from .engine.trainer import Trainer

        return Trainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
