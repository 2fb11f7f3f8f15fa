"""MegDet for Detectron2: large mini-batch detector training (Peng et al., CVPR 2018).

Importing the package registers ``NORM: "CGBN"`` and the appendix's backbones and heads in
Detectron2's registries. Nothing else of Detectron2 changes. Every name in ``__all__`` is public.
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
from ._older_detectron2 import norm_only as _norm_only
from ._version import __version__
from .config import add_megdet_config, load_config
from .memory import checkpoint_modules, checkpoint_stages
from .norm import registry as _registry
from .norm.batch_norm import CrossGPUBatchNorm, name_layers, set_accumulation_steps
from .norm.collective import OutOfStepError, raise_if_out_of_step
from .norm.configure import configure_cgbn, set_bn_size
from .norm.convert import convert_cgbn, revert_cgbn
from .norm.padding import ignore_padding
from .norm.registry import NORM_REGISTRY
from .norm.retinanet import separate_retinanet_levels
from .norm.running_statistics import average_statistics, averaged_statistics

__all__ = [
    "__version__",
    # Cross-GPU Batch Normalization (§3.3)
    "CrossGPUBatchNorm",
    "NORM_REGISTRY",
    "OutOfStepError",
    "average_statistics",
    "averaged_statistics",
    "configure_cgbn",
    "convert_cgbn",
    "fuse_activations",
    "ignore_padding",
    "name_layers",
    "raise_if_out_of_step",
    "revert_cgbn",
    "separate_retinanet_levels",
    "set_accumulation_steps",
    "set_bn_size",
    # Config, schedule (§3.2, §4) and training
    "DivergenceError",
    "Trainer",
    "add_megdet_config",
    "build_lr_scheduler",
    "build_optimizer",
    "evaluate",
    "launch",
    "load_config",
    "model_zoo",
    "prepare_config",
    "read_config",
    "scale_config",
    "setup",
    # Sublinear memory (§4)
    "checkpoint_modules",
    "checkpoint_stages",
    # Measurement (§3.1)
    "GradientNoise",
]

_registry.install()
try:
    from . import model_zoo
    from . import modeling as _modeling  # noqa: F401
    from .engine import Trainer, evaluate, launch, prepare_config, read_config, setup
    from .engine.divergence import DivergenceError
    from .gradient_noise.hook import GradientNoise
    from .modeling.fused_resnet import fuse_activations
    from .optim.build import build_optimizer
    from .schedule.build import build_lr_scheduler, scale_config
except ImportError as error:  # the norm needs less of Detectron2 than the rest
    __getattr__ = _norm_only(error, __all__)
else:
    _moved.install()
    __getattr__ = _moved.moved(__name__)
