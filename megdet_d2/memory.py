"""Runs parts of a model twice to save memory: sublinear memory (§4, Table 3).

A segment keeps only its input, and backward computes the rest again. The statistics of CGBN, C
floats per layer, are kept from the first forward. So the second forward repeats no collective.
Every norm updates its running statistics once. The loss and the gradients are those of the plain
model.

    checkpoint_stages(model, ("res2", "res3", "res4", "res5", "fpn"))  # a Detectron2 model
    checkpoint_modules(backbone.layers)                                # modules of any model

Both replace ``forward`` on the given modules, so ``state_dict``, hooks and names stay. In
evaluation and under ``torch.no_grad`` the modules run normally.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from detectron2.modeling.backbone.resnet import BottleneckBlock
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

import megdet_d2.norm.functional  # noqa: F401  # its operators, torch.ops.megdet_d2

from ._older_torch import CheckpointPolicy, create_selective_checkpoint_contexts

RESNET_STAGES = ("res2", "res3", "res4", "res5")
STAGES = ("stem", *RESNET_STAGES, "fpn", "rpn", "roi_heads")

# Called as keep(op, *args); True keeps the output of this call for the second forward.
Keep = Callable[..., bool]


def keep_nothing(op: torch._ops.OpOverload, *args: Any) -> bool:
    """Returns False: only the statistics of CGBN are kept, as always."""
    return False


def keep_spatial_convolutions(op: torch._ops.OpOverload, *args: Any) -> bool:
    """Returns True for convolutions wider than 1×1.

    They are half the arithmetic of a bottleneck block, and a twelfth of its bytes.
    """
    return op is torch.ops.aten.convolution.default and max(args[1].shape[2:]) > 1


def checkpoint_stages(model: nn.Module, stages: Sequence[str], blocks: int = 2) -> nn.Module:
    """Turns the named stages of a Detectron2 model into segments, in place.

    Args:
        stages: any of ``STAGES``: "stem"; "res2" to "res5"; "fpn" (each convolution with its norm);
            "rpn" (the head of the RPN or of RetinaNet); "roi_heads" (the layers of the heads).
        blocks: residual blocks per segment of "res2" to "res5". More blocks keep less memory, but
            need more at once when res2 is computed again.

    Returns:
        the model.

    Raises:
        ValueError: a name is not in ``STAGES``, or the model has no module for it.
    """
    check_stages(stages)
    for stage in stages:
        segments = list(_segments(model, stage))
        if not segments:
            has = ", ".join(stages_of(model))
            raise ValueError(
                f"MODEL.SUBLINEAR.STAGES has {stage!r}, but the model has no such stage; "
                f"use some of its stages: {has or 'none, so use checkpoint_modules'}"
            )
        for module, method in segments:
            if stage in RESNET_STAGES:
                keep = _keep_in_stage(cast(nn.Sequential, module))
                _replace(module, method, _forward_in_runs, module, blocks, keep)
            else:
                _replace(module, method, _forward, getattr(module, method), module, keep_nothing)
    return model


def checkpoint_modules(modules: Iterable[nn.Module], keep: Keep = keep_nothing) -> None:
    """Turns each of ``modules`` into a segment, in place.

    Layers other than CGBN that communicate inside a segment do so twice.

    Args:
        modules: any modules, whose forward takes and returns anything. Tensors in an object's
            attributes, outside of tuples, lists and dicts, do not count as inputs: the object
            keeps them in memory.
        keep: called as ``keep(op, *args)``; True also keeps the operator's output. A kept output
            must not be changed in place later.
    """
    for module in modules:
        _replace(module, "forward", _forward, module.forward, module, keep)


def stages_of(model: nn.Module) -> tuple[str, ...]:
    """Returns those of ``STAGES`` that a Detectron2 model has."""
    return tuple(name for name in STAGES if list(_segments(model, name)))


def check_stages(stages: Sequence[str]) -> None:
    """Checks the names.

    Raises:
        ValueError: a name is not in ``STAGES``.
    """
    for stage in stages:
        if stage not in STAGES:
            raise ValueError(
                f"MODEL.SUBLINEAR.STAGES has {stage!r}; use some of {', '.join(STAGES)}"
            )


@contextlib.contextmanager
def kept_bytes(model: nn.Module) -> Iterator[Callable[[], int]]:
    """Counts the bytes that are kept for backward, for the length of a ``with`` block.

    Yields:
        a function that returns the bytes so far. It counts every storage once, and leaves out the
        parameters and buffers of ``model``.
    """
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}  # by address, which is unique because kept storages are alive

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # otherwise an output and its graph would hold each other

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(kept.values())


# --- which modules -------------------------------------------------------------------------------


def _segments(model: nn.Module, stage: str) -> Iterator[tuple[nn.Module, str]]:
    """Yields the modules of a stage, each with the name of the method that computes it."""
    backbone = getattr(model, "backbone", None)
    bottom_up = getattr(backbone, "bottom_up", backbone)
    if stage == "stem" or stage in RESNET_STAGES:
        found: list[Any] = [getattr(bottom_up, stage, None)]
    elif stage == "fpn":
        found = [*getattr(backbone, "lateral_convs", ()), *getattr(backbone, "output_convs", ())]
    elif stage == "rpn":
        found = [getattr(getattr(model, "proposal_generator", None), "rpn_head", None)]
        found.append(getattr(model, "head", None))
    else:
        heads = getattr(model, "roi_heads", None)
        box_head = getattr(heads, "box_head", None)
        found = [*(box_head if isinstance(box_head, nn.ModuleList) else [box_head])]
        found.append(getattr(heads, "res5", None))
        found.append(getattr(heads, "segmentation_head", None))
        pooler = getattr(heads, "box_pooler", None)
        if pooler is not None and list(pooler.parameters()):  # a ContextPooler
            found.append(pooler)
        # Their forward also computes the loss and logs it, so only their layers are a segment.
        for head in (getattr(heads, "mask_head", None), getattr(heads, "keypoint_head", None)):
            if head is not None and hasattr(head, "layers"):
                yield head, "layers"
    yield from ((module, "forward") for module in found if module is not None)


def _keep_in_stage(stage: nn.Sequential) -> Keep:
    # Basic blocks consist of 3×3 convolutions only. Without a norm, the ReLU overwrites the
    # convolution's output.
    for block in stage:
        if not isinstance(block, BottleneckBlock) or block.conv2.norm is None:
            return keep_nothing
    return keep_spatial_convolutions


# --- how they run --------------------------------------------------------------------------------


def _replace(module: nn.Module, method: str, function: Callable, *args: Any) -> None:
    # On the instance. A partial of plain functions can be deep-copied and pickled.
    current = getattr(module, method)
    if getattr(current, "func", None) not in (_forward, _forward_in_runs):
        setattr(module, method, functools.partial(function, *args))


def _forward_in_runs(stage: nn.Sequential, blocks: int, keep: Keep, x: Tensor) -> Tensor:
    for start in range(0, len(stage), blocks):
        run = stage[start : start + blocks]
        run.training = stage.training  # run.train() would change the blocks too
        x = _forward(run.forward, run, keep, x)
    return x


@torch.compiler.disable  # a segment runs eagerly in a compiled model: its buffers are swapped
def _forward(plain: Callable, module: nn.Module, keep: Keep, *args: Any, **kwargs: Any) -> Any:
    """Runs ``plain``, a method of ``module``, as one segment."""
    # Autograd would not see tensors inside lists, and the bytes would not be counted.
    leaves, structure = tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    has_backward = any(tensor.requires_grad for tensor in [*tensors, *module.parameters()])
    if not (module.training and torch.is_grad_enabled() and has_backward):
        return plain(*args, **kwargs)

    def segment(*leaves: Any) -> Any:
        args, kwargs = tree_unflatten(leaves, structure)
        return plain(*args, **kwargs)

    return checkpoint(
        segment,
        *leaves,
        use_reentrant=False,
        context_fn=functools.partial(_contexts, module, keep),
        **_RESPECT_HOOKS,
    )


# Shows kept_bytes and users' hooks what segments keep. Older torch does not have this option.
_OPTION = "respect_saved_tensors_hooks"
_RESPECT_HOOKS: dict[str, Any] = (
    {_OPTION: True} if _OPTION in inspect.signature(checkpoint).parameters else {}
)


def _contexts(
    module: nn.Module, keep: Keep
) -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
    """Returns the contexts of a segment's first and second forward."""

    def policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        statistics = op is torch.ops.megdet_d2.statistics.default
        if statistics or keep(op, *args):
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    first, second = create_selective_checkpoint_contexts(policy)
    return first, _SecondForward(module, second)


class _SecondForward:
    """A context in which kept outputs replace their operators, and buffers keep their values.

    Batch norms update their running statistics in forward. In this context they update copies.
    """

    def __init__(self, module: nn.Module, kept: contextlib.AbstractContextManager):
        self.module, self.kept = module, kept

    def __enter__(self) -> None:
        self.buffers = [
            (layer, name, buffer)
            for layer in self.module.modules()
            for name, buffer in layer.named_buffers(recurse=False)
        ]
        for layer, name, buffer in self.buffers:
            layer._buffers[name] = buffer.clone()
        self.kept.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.kept.__exit__(*error)
        for layer, name, buffer in self.buffers:
            layer._buffers[name] = buffer
