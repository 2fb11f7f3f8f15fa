"""What happens around the training step, on every process."""

from detectron2.engine import HookBase

from megdet_d2.norm.collective import raise_if_out_of_step
from megdet_d2.norm.registry import cgbn_layers, images_per_group


class StopOutOfStep(HookBase):
    """Raises what CGBN layers noticed on CUDA in this step: processes in different layers.

    On CPU the layers raise by themselves. Detectron2's trainer waits for the losses in every step,
    so that reading one flag more stalls nothing.
    """

    def after_step(self):
        raise_if_out_of_step()


class BatchScalars(HookBase):
    """Writes images seen, the mini-batch and the BN size, in images, beside the other metrics.

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
            images_seen=self.trainer.images_seen,
            effective_batch_size=self._effective_batch_size,
            bn_size=self._bn_size,
            smoothing_hint=False,
        )
