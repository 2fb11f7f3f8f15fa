"""The memory layout and the compilation of a built model, without a change of ``state_dict``."""

import shutil
from collections.abc import Iterator

import torch
from detectron2.config import CfgNode
from torch import nn

from megdet_d2.norm.batch_norm import bare_model

BACKEND = "inductor"
_COMPILERS = ("c++", "g++", "clang++")


def check_compile(cfg: CfgNode) -> None:
    """Checks that ``MODEL.COMPILE`` can work with the other keys and on this machine.

    Raises:
        ValueError: padding is ignored, or on a CPU there is no C++ compiler.
    """
    if not cfg.MODEL.COMPILE:
        return
    if cfg.MODEL.CGBN.IGNORE_PADDING:
        raise ValueError(
            "MODEL.COMPILE and MODEL.CGBN.IGNORE_PADDING are both True, but the masks of the "
            "padding follow from the sizes of each batch's images, for which torch.compile would "
            "compile each batch; set one of them to False"
        )
    if cfg.MODEL.DEVICE != "cpu" or BACKEND != "inductor":
        return
    if not any(map(shutil.which, _COMPILERS)):
        raise ValueError(
            "MODEL.COMPILE is True, and on a CPU torch.compile needs a C++ compiler, but there is "
            f"none of {', '.join(_COMPILERS)}; install one (Debian: apt-get install g++), or set "
            "MODEL.COMPILE False"
        )


def prepare_model(model: nn.Module, cfg: CfgNode) -> nn.Module:
    """Applies ``MODEL.CHANNELS_LAST`` and ``MODEL.COMPILE``, in place.

    A second call changes nothing. Names and values of parameters and buffers stay, so checkpoints
    load with and without.

    Returns:
        the model.
    """
    if cfg.MODEL.CHANNELS_LAST:
        model.to(memory_format=torch.channels_last)
    if cfg.MODEL.COMPILE:
        compile_parts(model)
    return model


def compile_parts(model: nn.Module) -> nn.Module:
    """Compiles the backbone and the heads, in place, when they are first called.

    Sizes of images and numbers of boxes are variables of the compiled code. A few sizes compile a
    part again, and no size does so twice. What lies between the parts, such as matching and
    sampling of boxes, depends on values and runs as before.

    Returns:
        the model.
    """
    for part in compilable_parts(bare_model(model)):
        if part._compiled_call_impl is None:
            part.compile(dynamic=True, backend=BACKEND)
    return model


def compilable_parts(model: nn.Module) -> Iterator[nn.Module]:
    """Yields the parts of a Detectron2 model whose forward takes and returns tensors only.

    They are the backbone, the head of the RPN or of RetinaNet, and the layers of the box heads and
    box predictors. Mask and keypoint heads compute their losses in forward; their layers are not
    compiled.
    """
    heads = getattr(model, "roi_heads", None)
    found = [
        getattr(model, "backbone", None),
        getattr(getattr(model, "proposal_generator", None), "rpn_head", None),
        getattr(model, "head", None),
    ]
    for name in ("box_head", "box_predictor"):
        part = getattr(heads, name, None)
        found += part if isinstance(part, nn.ModuleList) else [part]
    yield from (part for part in found if isinstance(part, nn.Module))
