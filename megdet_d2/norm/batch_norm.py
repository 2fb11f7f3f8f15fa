"""The layer ``CrossGPUBatchNorm``, and functions over all such layers of a model."""

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from .functional import ALGORITHMS, Normalization, dense, statistics
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
    it on an empty input.

    Args:
        num_features: C, the channels of the input.
        eps: ε, which is added to the variance.
        momentum: weight of a mini-batch in the running statistics; None averages all mini-batches.
        affine: learn γ and β.
        track_running_stats: keep running statistics for evaluation.
        process_group: the processes to normalise over: a ``ProcessGroup``, ``SELF`` for this
            process alone, or None for all, as in ``nn.SyncBatchNorm``. All means a private
            group, since DDP uses torch's ``WORLD``. The layer keeps its name only, so that it can
            be deep-copied and pickled.
        algorithm: "one_reduce", or "two_pass" for the paper's two reductions.

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
            not 2-D to 5-D; on CPU, the whole mini-batch has one value per channel.
        RuntimeError: the gradient is differentiated a second time, which is not supported.
    """

    reverts_to: type[nn.Module] = nn.BatchNorm2d  # the class that ``revert_cgbn`` puts in place

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
    ):
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype
        )
        if algorithm not in ALGORITHMS:
            raise ValueError(
                f"CrossGPUBatchNorm: algorithm is {algorithm!r}; use one of {', '.join(ALGORITHMS)}"
            )
        skipped = torch.zeros((), dtype=torch.int64, device=device) if track_running_stats else None
        self.register_buffer("num_batches_skipped", skipped, persistent=False)
        self.algorithm = algorithm
        self.process_group = process_group
        self.accumulation_steps = 1
        self.valid_region: ValidRegion | None = None
        # Until name_layers is called. A number would not do, because a process may build layers
        # that the others do not have.
        self.name = f"unnamed ({num_features} channels)"

    @property
    def process_group(self) -> BNGroup:
        """The process group to normalise over; assign to change it."""
        if self._group_name is None:
            return None
        if self._group_name == "":
            return SELF
        return _resolve_process_group(cast(Any, self._group_name))

    @process_group.setter
    def process_group(self, group: BNGroup) -> None:
        # Stored with the name, because torch.compile cannot look up a group.
        if group is None or group is dist.group.WORLD:  # DDP uses WORLD, so the layers do not
            self._group_name, self._group_size = None, None
        elif isinstance(group, SelfGroup):
            self._group_name, self._group_size = "", 1
        elif group == dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(
                "CrossGPUBatchNorm: this process is not in the given process group; "
                "give each process the group that it is in"
            )
        else:
            self._group_name, self._group_size = group.group_name, group.size()

    def group_size(self) -> int:
        """Returns the number of processes that share the statistics; 1 without a process group."""
        if not (dist.is_available() and dist.is_initialized()):
            return 1
        return dist.get_world_size() if self._group_size is None else self._group_size

    def _sync_name(self) -> str:
        """Returns the name of the group to reduce over; "" for a group of one process."""
        if self.group_size() == 1:
            return ""
        return self._group_name or world_group_name()

    def forward(self, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """Normalises x, then adds ``residual`` and applies ReLU on demand.

        Triton's kernels do all of it in one pass; elsewhere these are separate passes.

        Args:
            x: see the class for shapes and dtypes.
            residual: x's shape and dtype; or None.
            relu: returns max(0, ·) of the sum.
        """
        self._check_input_dim(x)
        if not self.training:
            batch_statistics = self.running_mean is None
            y = F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, batch_statistics,
                0.0, self.eps,
            )  # fmt: skip
            y = y if residual is None else y + residual
            return F.relu(y) if relu else y
        momentum = self.momentum
        if momentum is not None and self.accumulation_steps > 1:
            momentum = 1 - (1 - momentum) ** (1 / self.accumulation_steps)
        x = dense(x)
        valid = None if self.valid_region is None else self.valid_region.mask(x)
        group = self._sync_name()
        mean, var, count = statistics(
            x.detach(), valid, self.running_mean, self.running_var, self.num_batches_tracked,
            self.num_batches_skipped, momentum, group, self.algorithm, self.name,
        )  # fmt: skip
        invstd = torch.rsqrt(var + self.eps)
        return Normalization.apply(
            x, self.weight, self.bias, residual, valid, mean, invstd, count, relu, group, self.name
        )

    def _check_input_dim(self, x: Tensor) -> None:
        if not 2 <= x.dim() <= 5:
            raise ValueError(f"CrossGPUBatchNorm: expected a 2-D to 5-D input, got {x.dim()}-D")
        if x.shape[1] != self.num_features:
            raise ValueError(
                f"CrossGPUBatchNorm: expected {self.num_features} channels, got {x.shape[1]}"
            )

    def extra_repr(self) -> str:
        """Returns the arguments for ``repr``, with the process group and the algorithm."""
        group = {None: "world", "": "self"}.get(self._group_name, self._group_name)
        text = f"{super().extra_repr()}, process_group={group}, algorithm={self.algorithm}"
        if self.accumulation_steps > 1:
            text += f", accumulation_steps={self.accumulation_steps}"
        return text


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


def name_layers(model: nn.Module) -> nn.Module:
    """Gives every CGBN layer the name that it has in ``model``, in place; returns the model.

    The names have no "module." prefix where ``model`` is a ``DistributedDataParallel``.
    """
    bare = model.module if isinstance(model, DistributedDataParallel) else model
    for name, layer in bare.named_modules():
        if isinstance(layer, CrossGPUBatchNorm):
            layer.name = name or layer.name
    return model
