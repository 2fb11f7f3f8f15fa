"""What happens around the training step, on every process."""

import torch
import torch.distributed as dist
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import nn

from megdet_d2.norm.collective import raise_if_out_of_step
from megdet_d2.norm.registry import cgbn_layers, images_per_group


@torch.no_grad()
def average_statistics(model: nn.Module) -> None:
    """Makes the running statistics of every CGBN layer the mean over all processes, in place.

    Within a group they are equal already; groups differ, since each saw images of its own, and
    Detectron2 saves and evaluates with rank 0's. One all-reduce, which every process has to join.
    """
    if comm.get_world_size() == 1:
        return
    statistics = [
        statistic
        for layer in cgbn_layers(model)
        if layer.running_mean is not None
        for statistic in (layer.running_mean, layer.running_var)
    ]
    if not statistics:
        return
    flat = torch.cat([statistic.double() for statistic in statistics])
    dist.all_reduce(flat)
    flat /= comm.get_world_size()
    parts = flat.split([statistic.numel() for statistic in statistics])
    for statistic, mean in zip(statistics, parts, strict=True):
        statistic.copy_(mean)


class AverageStatistics(HookBase):
    """Averages the running statistics over the groups before each checkpoint and evaluation.

    Stands before the checkpointer and the evaluation hook, in every process. Training is not
    disturbed: running statistics play no part in a training step.
    """

    def __init__(self, model: nn.Module, checkpoint_period: int, eval_period: int):
        self._model = model
        self._periods = [period for period in (checkpoint_period, eval_period) if period > 0]

    def after_step(self):
        done = self.trainer.iter + 1
        if done >= self.trainer.max_iter or any(done % period == 0 for period in self._periods):
            average_statistics(self._model)


class StopOutOfStep(HookBase):
    """Raises what CGBN layers noticed on CUDA in this step: processes in different layers.

    On CPU the layers raise by themselves. Detectron2's trainer waits for the losses in every step,
    so that reading one flag more stalls nothing.
    """

    def after_step(self):
        raise_if_out_of_step()


class BatchScalars(HookBase):
    """Writes the mini-batch and the BN size, in images, beside the other metrics.

    Without a CGBN layer the BN size is 0, as the paper's Table 3 has it.
    """

    def __init__(self, effective_batch_size: int, images_per_gpu: int):
        self._effective_batch_size = effective_batch_size
        self._images_per_gpu = images_per_gpu

    def before_train(self):
        self._bn_size = images_per_group(self.trainer.model, self._images_per_gpu)
        counters = [layer.num_batches_skipped for layer in cgbn_layers(self.trainer.model)]
        self._skipped = [counter for counter in counters if counter is not None]

    def after_step(self):
        # Reading the counters waits for the GPU: once, and as seldom as the writers write.
        if (self.trainer.iter + 1) % 20 == 0 or self.trainer.iter + 1 >= self.trainer.max_iter:
            skipped = int(sum(self._skipped))
            self.trainer.storage.put_scalar("cgbn_skipped_batches", skipped, smoothing_hint=False)
        self.trainer.storage.put_scalars(
            effective_batch_size=self._effective_batch_size,
            bn_size=self._bn_size,
            smoothing_hint=False,
        )
