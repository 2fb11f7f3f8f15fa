"""Sublinear memory (§4, Table 3): a segment keeps its input, and backward computes it again.

What the second forward must not repeat is kept from the first: the statistics of CGBN, C floats a
layer, and with them its collective. Running statistics are updated once, by any norm, and loss and
gradients are those of the plain model.

    checkpoint_stages(model, ("res2", "res3", "res4", "res5", "fpn"))  # a Detectron2 model
    checkpoint_modules(backbone.layers)                                # modules of any model

Both replace ``forward`` on the modules given, so ``state_dict``, hooks and names stay. In
evaluation and under ``torch.no_grad`` the modules run as ever.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from detectron2.modeling.backbone.resnet import BottleneckBlock
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import megdet_d2.norm.functional  # noqa: F401  # its operators, torch.ops.megdet_d2

RESNET_STAGES = ("res2", "res3", "res4", "res5")
STAGES = ("stem", *RESNET_STAGES, "fpn", "rpn", "roi_heads")

# Whether the output of an operator, called with these arguments, is kept for the second forward.
Keep = Callable[..., bool]


def keep_nothing(op: torch._ops.OpOverload, *args) -> bool:
    """Nothing but the statistics, which are always kept."""
    return False


def keep_spatial_convolutions(op: torch._ops.OpOverload, *args) -> bool:
    """Convolutions wider than 1×1: of a bottleneck half the arithmetic, a twelfth of the bytes."""
    return op is torch.ops.aten.convolution.default and max(args[1].shape[2:]) > 1


def checkpoint_stages(model: nn.Module, stages: Sequence[str], blocks: int = 2) -> nn.Module:
    """Makes the named stages of a Detectron2 model segments, in place; returns the model.

    "stem"; "res2" to "res5"; "fpn", each of its convolutions with its norm; "rpn", the head of the
    RPN or of RetinaNet; "roi_heads", the layers of its heads.

    Args:
        blocks: residual blocks in a segment of "res2" to "res5". More keep less, but need more at
            once when res2 is computed again.

    Raises:
        ValueError: a name that is none of ``STAGES``, or that this model has no module for.
    """
    check_stages(stages)
    for stage in stages:
        segments = list(_segments(model, stage))
        if not segments:
            has = ", ".join(name for name in STAGES if list(_segments(model, name)))
            raise ValueError(
                f"MODEL.SUBLINEAR.STAGES has {stage!r}, and the model has no such stage; "
                f"use some of those it has: {has or 'none, so use checkpoint_modules'}"
            )
        for module, method in segments:
            if stage in RESNET_STAGES:
                _replace(module, method, _forward_in_runs, module, blocks, _keep_in_stage(module))
            else:
                _replace(module, method, _forward, getattr(module, method), module, keep_nothing)
    return model


def checkpoint_modules(modules: Iterable[nn.Module], keep: Keep = keep_nothing) -> None:
    """Makes each of ``modules`` a segment: any modules, whose forward takes and returns anything.

    Tensors outside of tuples, lists and dicts (in an object's attributes) do not count as inputs,
    and are kept alive by the object. Layers inside that communicate, other than CGBN, do so twice.

    Args:
        keep: called as ``keep(op, *args)``; True keeps the operator's output as well. What is kept
            must not be changed in place afterwards.
    """
    for module in modules:
        _replace(module, "forward", _forward, module.forward, module, keep)


def check_stages(stages: Sequence[str]) -> None:
    """Raises a ValueError at a name that is none of ``STAGES``."""
    for stage in stages:
        if stage not in STAGES:
            raise ValueError(
                f"MODEL.SUBLINEAR.STAGES has {stage!r}; use some of {', '.join(STAGES)}"
            )


@contextlib.contextmanager
def kept_bytes(model: nn.Module) -> Iterator[Callable[[], int]]:
    """Within it, forwards count what autograd and segments keep for backward.

    Yields:
        A function that returns the bytes so far, every storage counted once, parameters and
        buffers of ``model`` not at all.
    """
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}  # what is kept is alive, so an address stands for one storage

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # an output itself would hold the graph that holds it

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(kept.values())


# --- which modules -------------------------------------------------------------------------------


def _segments(model: nn.Module, stage: str) -> Iterator[tuple[nn.Module, str]]:
    """The modules of a stage, each with the method that computes it."""
    backbone = getattr(model, "backbone", None)
    bottom_up = getattr(backbone, "bottom_up", backbone)
    if stage == "stem" or stage in RESNET_STAGES:
        found = [getattr(bottom_up, stage, None)]
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
        # Their forward computes the loss too, and logs it.
        for head in (getattr(heads, "mask_head", None), getattr(heads, "keypoint_head", None)):
            if hasattr(head, "layers"):
                yield head, "layers"
    yield from ((module, "forward") for module in found if module is not None)


def _keep_in_stage(stage: nn.Sequential) -> Keep:
    # Basic blocks are 3×3 convolutions through and through. And where no norm follows, the ReLU
    # overwrites the convolution's output.
    for block in stage:
        if not isinstance(block, BottleneckBlock) or block.conv2.norm is None:
            return keep_nothing
    return keep_spatial_convolutions


# --- how they run --------------------------------------------------------------------------------


def _replace(module: nn.Module, method: str, function: Callable, *args) -> None:
    # On the instance, and a partial of plain functions: it can be deep-copied and pickled.
    current = getattr(module, method)
    if getattr(current, "func", None) not in (_forward, _forward_in_runs):
        setattr(module, method, functools.partial(function, *args))


def _forward_in_runs(stage: nn.Sequential, blocks: int, keep: Keep, x: Tensor) -> Tensor:
    for start in range(0, len(stage), blocks):
        run = stage[start : start + blocks]
        run.training = stage.training  # not run.train(), which would reach the blocks
        x = _forward(run.forward, run, keep, x)
    return x


@torch.compiler.disable  # a segment runs eagerly in a compiled model: its buffers are swapped
def _forward(plain: Callable, module: nn.Module, keep: Keep, *args, **kwargs):
    """``plain``, the method of ``module``, as one segment."""
    # Tensors within lists would be out of autograd's sight, and out of the count of bytes.
    leaves, structure = tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    has_backward = any(tensor.requires_grad for tensor in [*tensors, *module.parameters()])
    if not (module.training and torch.is_grad_enabled() and has_backward):
        return plain(*args, **kwargs)

    def segment(*leaves):
        args, kwargs = tree_unflatten(leaves, structure)
        return plain(*args, **kwargs)

    return checkpoint(
        segment,
        *leaves,
        use_reentrant=False,
        context_fn=functools.partial(_contexts, module, keep),
        **_RESPECT_HOOKS,
    )


# So that kept_bytes, and users' own hooks, see what segments keep. Older torch has no such option.
_OPTION = "respect_saved_tensors_hooks"
_RESPECT_HOOKS = {_OPTION: True} if _OPTION in inspect.signature(checkpoint).parameters else {}


def _contexts(module: nn.Module, keep: Keep):
    """The contexts of a segment's first and second forward."""

    def policy(_, op, *args, **kwargs) -> CheckpointPolicy:
        statistics = op is torch.ops.megdet_d2.statistics.default
        if statistics or keep(op, *args):
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    first, second = create_selective_checkpoint_contexts(policy)
    return first, _SecondForward(module, second)


class _SecondForward:
    """Kept outputs replace their operators, and what layers write into buffers is dropped.

    Batch norms update their running statistics in forward. The second time they do so in copies.
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

    def __exit__(self, *error) -> None:
        self.kept.__exit__(*error)
        for layer, name, buffer in self.buffers:
            layer._buffers[name] = buffer
