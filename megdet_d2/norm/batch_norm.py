"""The layer: ``nn.BatchNorm2d`` with the statistics of a group of processes."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from .functional import ALGORITHMS, Normalization, dense, statistics
from .groups import SELF, BNGroup
from .padding import ValidRegion


class CrossGPUBatchNorm(nn.BatchNorm2d):
    """Cross-GPU Batch Normalization (MegDet §3.3, Algorithm 1).

    Takes (N, C), (N, C, L), (N, C, H, W) or (N, C, D, H, W), any N from 0, of any floating dtype,
    sizes differing between processes as they like; returns the same shape, dtype and layout.
    Parameters, buffers and ``state_dict`` are ``nn.BatchNorm2d``'s, so checkpoints go both ways
    and whatever treats batch norm specially (Detectron2's FREEZE_AT and WEIGHT_DECAY_NORM,
    PreciseBN, export) treats this layer so.

    It is a plain batch norm in evaluation, in one process, and before a process group exists. In
    training each forward is one collective (two with ``two_pass``) and each backward one, always:
    all processes of the group have to run the layer, a process without images on an empty input.

    Args:
        num_features, eps, momentum, affine, track_running_stats: as ``nn.BatchNorm2d``.
        process_group: the processes to normalise over: a ``ProcessGroup``, ``SELF`` for this
            process alone, or None for all, as in ``nn.SyncBatchNorm``. Kept by its name, so that
            the layer can be deep-copied and pickled.
        algorithm: "one_reduce", or "two_pass" for the paper's two reductions.

    Attributes:
        accumulation_steps: forwards that make up one update of the parameters, k; 1 at first. Each
            then moves the running statistics with the momentum 1 - (1 - momentum)^(1/k), so that k
            of them forget as much as one forward with the whole mini-batch would.
        valid_region: where each image of the input is, see ``padding``; None for everywhere.
        num_batches_skipped: mini-batches that left the running statistics as they were, since
            theirs were not finite, or of one value. Not part of ``state_dict``.
        name: what errors call the layer, and what tells it from the group's other layers;
            ``name_layers`` makes it the name in the model.

    Raises:
        OutOfStepError: the processes of the group are in different layers; see ``collective``.
        ValueError: an unknown algorithm; a process group that this process is not in; an input that
            is not 2-D to 5-D; on CPU, a mini-batch of one value a channel.
    """

    reverts_to: type[nn.Module] = nn.BatchNorm2d  # what ``revert_cgbn`` makes of the layer

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: BNGroup = None,
        algorithm: str = "one_reduce",
        device=None,
        dtype=None,
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
        # Until a model is there to name it by. No number: processes need not build the same layers
        # besides those they share.
        self.name = f"unnamed ({num_features} channels)"

    @property
    def process_group(self) -> BNGroup:
        """The group given; assign to change it."""
        if self._group_name is None:
            return None
        if self._group_name == "":
            return SELF
        return dist.distributed_c10d._resolve_process_group(self._group_name)

    @process_group.setter
    def process_group(self, group: BNGroup) -> None:
        # The size is kept beside the name: torch.compile cannot look a group up.
        if group is None:
            self._group_name, self._group_size = None, None
        elif group is SELF:
            self._group_name, self._group_size = "", 1
        elif group == dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(
                "CrossGPUBatchNorm: this process is not in the process group it was given; "
                "give each process the group that it is in"
            )
        else:
            self._group_name, self._group_size = group.group_name, group.size()

    def group_size(self) -> int:
        """How many processes share the statistics; 1 where no process group exists."""
        if not (dist.is_available() and dist.is_initialized()):
            return 1
        return dist.get_world_size() if self._group_size is None else self._group_size

    def _sync_name(self) -> str:
        """Name of the group to reduce over; "" where there is nobody to reduce with."""
        if self.group_size() == 1:
            return ""
        return self._group_name or dist.group.WORLD.group_name

    def forward(self, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """Normalises x; see the class for shapes and dtypes.

        Args:
            residual: added to the result, of its shape and dtype.
            relu: return max(0, ·) of that. Fused with the normalisation where Triton is.
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
        group = {None: "world", "": "self"}.get(self._group_name, self._group_name)
        text = f"{super().extra_repr()}, process_group={group}, algorithm={self.algorithm}"
        if self.accumulation_steps > 1:
            text += f", accumulation_steps={self.accumulation_steps}"
        return text


def cgbn_layers(model: nn.Module) -> list[CrossGPUBatchNorm]:
    """The CGBN layers of ``model``, in the order of ``model.modules()``."""
    return [layer for layer in model.modules() if isinstance(layer, CrossGPUBatchNorm)]


def set_accumulation_steps(model: nn.Module, steps: int) -> nn.Module:
    """Tells every CGBN layer of ``model`` that ``steps`` forwards make up an update; returns it.

    Raises:
        ValueError: steps is below 1.
    """
    if steps < 1:
        raise ValueError(f"set_accumulation_steps: steps is {steps}; it counts from 1")
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
