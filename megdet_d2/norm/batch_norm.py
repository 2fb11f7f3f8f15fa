"""The layer ``CrossGPUBatchNorm``, and functions over all such layers of a model."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from .collective import find_group, prepare
from .functional import (
    ALGORITHMS,
    Normalization,
    by_torch,
    dense,
    is_transformed,
    runs_by_torch,
    statistics,
)
from .groups import SELF, BNGroup, SelfGroup, world_group_name
from .padding import ValidRegion


class CrossGPUBatchNorm(nn.BatchNorm2d):
    """The Cross-GPU Batch Normalization of MegDet (§3.3, Algorithm 1).

    The equations are in ``functional``. The input is (N, C), (N, C, L), (N, C, H, W) or
    (N, C, D, H, W), of any floating dtype. N may be 0, and sizes may differ between processes. The
    output has the same shape, dtype and layout.

    Parameters, buffers and ``state_dict`` are those of ``nn.BatchNorm2d``. So the two load each
    other's checkpoints. Code with a special case for batch norms (Detectron2's FREEZE_AT and
    WEIGHT_DECAY_NORM, PreciseBN, export) treats this layer as one.

    The layer is a plain batch norm in evaluation, in one process, and before a process group
    exists. In training each forward makes one collective (two with "two_pass"), and each backward
    makes one. So all processes of the group have to run the layer. A process without images runs
    it on an empty input. A backward with ``create_graph`` makes three, and can be differentiated to
    any order.

    In evaluation the layer can be scripted, traced and exported as ``nn.BatchNorm2d`` can. For
    ``torch.fx`` it is a leaf, as torch's own layers are. In training ``torch.func``, forward-mode
    gradients, ``torch.jit.trace`` and ONNX work in one process, and raise an error in several.

    Args:
        num_features: C, the channels of the input.
        eps: ε, which is added to the variance.
        momentum: weight of a mini-batch in the running statistics; None averages all mini-batches.
        affine: learn γ and β.
        track_running_stats: keep running statistics for evaluation.
        process_group: the processes to normalise over: a ``ProcessGroup``, a ``DeviceMesh`` of one
            dimension, ``SELF`` for this process alone, or None for all, as in ``nn.SyncBatchNorm``.
            All means a private group, since DDP uses torch's ``WORLD``. The layer keeps its name
            only, so that it can be deep-copied and pickled.
        algorithm: "one_reduce", or "two_pass" for the paper's two reductions. On GPUs use
            "two_pass" for float64 values whose mean is more than 10⁴ deviations from zero.
        bias: learn β, if ``affine``.

    Attributes:
        accumulation_steps: k, the forwards per update of the parameters; 1 by default. Each forward
            moves the running statistics with the momentum 1 - (1 - momentum)^(1/k). So k forwards
            weigh as much as one forward with the whole mini-batch.
        valid_region: where each image of the input is, see ``padding``; None for everywhere.
        num_batches_skipped: mini-batches that left the running statistics unchanged, because their
            statistics were not finite or came from one value. It is not in ``state_dict``.
        name: the layer's name in errors. It also distinguishes the layers of a group, so it is the
            same on every process; ``name_layers`` sets it to the name in the model.

    Raises:
        OutOfStepError: the processes of the group are in different layers; see ``collective``.
        ValueError: the algorithm is unknown; this process is not in the process group; the input is
            not 2-D to 5-D; ε is negative; on CPU, ε is 0 and so is a channel's variance, or the
            whole mini-batch has one value per channel.
        RuntimeError: the process group does not exist any more; a scripted layer is in training; a
            layer in training over several processes is traced, exported to ONNX, or transformed.
    """

    # The class that ``revert_cgbn`` gives the layer. TorchScript cannot read an annotation of it.
    reverts_to = nn.BatchNorm2d
    num_batches_skipped: Tensor | None
    __jit_unused_properties__ = ["process_group"]

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: BNGroup = None,
        algorithm: str = "one_reduce",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
    ):
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype
        )
        if not bias:
            self.register_parameter("bias", None)
        if algorithm not in ALGORITHMS:
            raise ValueError(
                f"CrossGPUBatchNorm: algorithm is {algorithm!r}; use one of {', '.join(ALGORITHMS)}"
            )
        self.set_up(process_group, algorithm)

    def set_up(self, process_group: BNGroup, algorithm: str = "one_reduce") -> None:
        """Sets the attributes that a plain batch norm does not have, to their values at the start.

        Args:
            process_group: as in the class.
            algorithm: as in the class.
        """
        self.algorithm = algorithm
        self.process_group = process_group
        tracked = self.num_batches_tracked
        skipped = None if tracked is None else torch.zeros_like(tracked)
        self.register_buffer("num_batches_skipped", skipped, persistent=False)
        self.accumulation_steps = 1
        self.valid_region: ValidRegion | None = None
        # Until name_layers is called. A number would not do, because a process may build layers
        # that the others do not have.
        self.name = f"unnamed ({self.num_features} channels)"

    def tear_down(self) -> None:
        """Removes the attributes that ``set_up`` has set, before a change of the class."""
        del self.num_batches_skipped, self.accumulation_steps, self.valid_region
        del self.algorithm, self._group_name, self._group_size, self._group_ranks, self.name
        vars(self).pop("reverts_to", None)

    @property
    def process_group(self) -> BNGroup:
        """The process group to normalise over; assign to change it."""
        if self._group_name is None:
            return None
        if self._group_name == "":
            return SELF
        return find_group(self._group_name, self.name, self._group_ranks)

    @process_group.setter
    def process_group(self, group: BNGroup) -> None:
        # Stored with the name, because torch.compile cannot look up a group.
        self._group_ranks: list[int] | None = None
        if isinstance(group, DeviceMesh):
            group = _group_of_mesh(group)
        if group is None or group is dist.group.WORLD:  # DDP uses WORLD, so the layers do not
            self._group_name, self._group_size = None, None
        elif isinstance(group, SelfGroup):
            self._group_name, self._group_size = "", 1
        elif group == dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(
                "CrossGPUBatchNorm: this process is not in the given process group; "
                "give each process the group that it is in"
            )
        elif isinstance(group, dist.ProcessGroup):
            self._group_name, self._group_size = group.group_name, group.size()
            self._group_ranks = dist.get_process_group_ranks(group)
            prepare(group)
        else:
            raise TypeError(
                f"CrossGPUBatchNorm: process_group is {group!r}; give a ProcessGroup (from "
                "torch.distributed.new_group), a DeviceMesh of one dimension, SELF or None"
            )

    def group_size(self) -> int:
        """Returns the number of processes that share the statistics; 1 without a process group."""
        if not (dist.is_available() and dist.is_initialized()):
            return 1
        return dist.get_world_size() if self._group_size is None else self._group_size

    def _sync_name(self) -> str:
        """Returns the name of the group to reduce over; "" for a group of one process."""
        if self._group_name == "" or self.group_size() == 1:
            return ""
        if self._group_name is None:
            return world_group_name()
        if not torch.compiler.is_compiling():
            find_group(self._group_name, self.name, self._group_ranks)
        return self._group_name

    def forward(self, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """Normalises x, then adds ``residual`` and applies ReLU on demand.

        Triton's kernels do all of it in one pass; elsewhere these are separate passes.

        Args:
            x: see the class for shapes and dtypes.
            residual: x's shape and dtype; or None.
            relu: returns max(0, ·) of the sum.
        """
        if torch.jit.is_scripting():
            if self.training:
                raise RuntimeError(
                    "CrossGPUBatchNorm is in training mode, which TorchScript does not support: "
                    "call eval(), or call megdet_d2.revert_cgbn(model) before torch.jit.script"
                )
            return self._evaluate(x, residual, relu)
        proxy: Any = x
        if isinstance(proxy, fx.Proxy):  # a leaf of the traced graph, as torch's own layers are
            tracer: Any = proxy.tracer
            given = (residual, relu) if relu else () if residual is None else (residual,)
            return tracer.create_proxy(
                "call_module", tracer.path_of_module(self), (proxy, *given), {}
            )
        self._check_input_dim(x)
        if not self.training:
            return self._evaluate(x, residual, relu)
        if self.eps < 0:
            raise ValueError(f"CGBN layer {self.name}: eps is {self.eps}; give it above 0")
        kept = self._buffers  # an attribute of nn.Module takes the host a microsecond to find
        running_mean, running_var = kept["running_mean"], kept["running_var"]
        if (running_mean is None) != (running_var is None):
            raise ValueError(
                f"CGBN layer {self.name}: one of running_mean and running_var is None; set both or "
                "neither"
            )
        momentum = self.momentum
        if momentum is not None and self.accumulation_steps > 1:
            momentum = 1 - (1 - momentum) ** (1 / self.accumulation_steps)
        group = self._sync_name()
        valid = None if self.valid_region is None else self.valid_region.mask(x)
        if _needs_torch_operators():
            return self._train_by_torch(x, residual, relu, momentum, group, valid)
        # As in torch's batch norm, the flag also works on a layer in use.
        buffers: Any = (None, None, None, None)
        if self.track_running_stats:
            counts = kept["num_batches_tracked"], kept["num_batches_skipped"]
            buffers = running_mean, running_var, *counts
        weight, bias = self.weight, self.bias
        if not group and runs_by_torch(x, weight, valid, self.eps):
            y = by_torch(x, weight, bias, buffers, momentum, self.eps)
            return _activate(y, residual, relu)
        x = dense(x)
        stats, count = statistics(
            x, weight, bias, valid, *buffers, momentum, self.eps, group, self.algorithm, self.name
        )
        if self.eps == 0 and not x.is_cuda and bool(stats[1].isinf().any()):
            raise ValueError(
                f"CGBN layer {self.name}: eps is 0, and all values of a channel are equal, which "
                "cannot be divided by their deviation; give eps above 0"
            )
        return Normalization.apply(
            x, weight, bias, residual, valid, stats, count, self.eps, relu, group, self.name
        )

    def _evaluate(self, x: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
        y = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias,
            self.running_mean is None and self.running_var is None, 0.0, self.eps,
        )  # fmt: skip
        return _activate(y, residual, relu)

    def _train_by_torch(
        self,
        x: Tensor,
        residual: Tensor | None,
        relu: bool,
        momentum: float | None,
        group: str,
        valid: Tensor | None,
    ) -> Tensor:
        """Returns the output in training by torch's own batch norm, which all of torch knows.

        Raises:
            RuntimeError: the layer normalises over several processes, or leaves out padding.
        """
        if group or valid is not None:
            what = "leaves out padding" if not group else "normalises over several processes"
            raise RuntimeError(
                f"CGBN layer {self.name} is in training mode and {what}, which torch.func, "
                "forward-mode gradients, torch.jit.trace and ONNX do not support: call eval(), or "
                "call megdet_d2.revert_cgbn(model) first"
            )
        running_mean, running_var = self.running_mean, self.running_var
        factor = momentum or 0.0
        if not self.track_running_stats:
            running_mean = running_var = None
        elif self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if momentum is None:
                factor = 1 / float(self.num_batches_tracked)
        y = F.batch_norm(
            x, running_mean, running_var, self.weight, self.bias, True, factor, self.eps
        )
        return _activate(y, residual, relu)

    def _check_input_dim(self, x: Tensor) -> None:
        if not 2 <= x.dim() <= 5:
            raise ValueError(f"CrossGPUBatchNorm: expected a 2-D to 5-D input, got {x.dim()}-D")
        if x.shape[1] != self.num_features:
            raise ValueError(
                f"CrossGPUBatchNorm: expected {self.num_features} channels, got {x.shape[1]}"
            )

    def reset_running_stats(self) -> None:
        """Sets back the running statistics and both counts of mini-batches."""
        super().reset_running_stats()
        skipped = getattr(self, "num_batches_skipped", None)  # missing in the base's constructor
        if skipped is not None:
            skipped.zero_()

    def _apply(self, *args: Any, **kwargs: Any) -> "CrossGPUBatchNorm":
        """Keeps ``num_batches_skipped``: no checkpoint restores it after ``to_empty``."""
        old = self.num_batches_skipped
        super()._apply(*args, **kwargs)
        new = self.num_batches_skipped
        if new is not None and new is not old and not new.is_meta:
            new.zero_() if old is None or old.is_meta else new.copy_(old)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Keeps ``num_batches_skipped`` on the device of the others, also with ``assign``."""
        super()._load_from_state_dict(*args, **kwargs)
        skipped, tracked = self.num_batches_skipped, self.num_batches_tracked
        if skipped is not None and tracked is not None and skipped.device != tracked.device:
            self.num_batches_skipped = torch.zeros_like(tracked)

    def extra_repr(self) -> str:
        """Returns the arguments for ``repr``, with the process group and the algorithm."""
        group = {None: "world", "": "self"}.get(self._group_name, self._group_name)
        text = f"{super().extra_repr()}, process_group={group}, algorithm={self.algorithm}"
        if self.accumulation_steps > 1:
            text += f", accumulation_steps={self.accumulation_steps}"
        return text


def _activate(y: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    if residual is not None:
        y = y + residual.to(y.dtype)
    return F.relu(y) if relu else y


# Older torch does not have it.
_is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)


def _needs_torch_operators() -> bool:
    """Returns True in code that knows torch's operators only, and not those of this package."""
    if torch.compiler.is_compiling():
        return _is_exporting() and torch.onnx.is_in_onnx_export()
    return is_transformed()


def _group_of_mesh(mesh: DeviceMesh) -> dist.ProcessGroup:
    if mesh.ndim != 1:
        raise ValueError(
            f"CrossGPUBatchNorm: process_group is a DeviceMesh of {mesh.ndim} dimensions "
            f"{mesh.mesh_dim_names or ''}; give one of them, for example mesh['dp'], or its group"
        )
    if mesh.get_coordinate() is None:
        raise ValueError(
            "CrossGPUBatchNorm: this process is not in the given DeviceMesh; "
            "give each process a mesh that it is in"
        )
    return mesh.get_group()


def cgbn_layers(model: nn.Module) -> list[CrossGPUBatchNorm]:
    """Returns the CGBN layers of ``model``, in the order of ``model.modules()``."""
    return [layer for layer in model.modules() if isinstance(layer, CrossGPUBatchNorm)]


def set_accumulation_steps(model: nn.Module, steps: int) -> nn.Module:
    """Sets ``accumulation_steps`` of every CGBN layer, in place; returns the model.

    Args:
        steps: forwards per update of the parameters.

    Raises:
        ValueError: steps is below 1.
    """
    if steps < 1:
        raise ValueError(f"set_accumulation_steps: steps is {steps}; give 1 or more")
    for layer in cgbn_layers(model):
        layer.accumulation_steps = steps
    return model


def bare_model(model: nn.Module) -> nn.Module:
    """Returns the model inside of a ``DistributedDataParallel``, and any other as it is."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def name_layers(model: nn.Module) -> nn.Module:
    """Gives every CGBN layer the name that it has in ``model``, in place; returns the model.

    The names have no "module." prefix where ``model`` is a ``DistributedDataParallel``.
    """
    for name, layer in bare_model(model).named_modules():
        if isinstance(layer, CrossGPUBatchNorm):
            layer.name = name or layer.name
    return model
