"""What happens around the training step, on every process."""

import logging
import time

import torch
from detectron2.engine import HookBase, TrainerBase
from detectron2.utils import comm
from torch import nn

from megdet_d2.norm.batch_norm import cgbn_layers
from megdet_d2.norm.collective import raise_if_out_of_step
from megdet_d2.norm.configure import images_per_group

logger = logging.getLogger(__name__)

# Steps between two looks at counters: as seldom as Detectron2's writers write.
PERIOD = 20


class StopOutOfStep(HookBase):
    """Raises what CGBN layers noticed on CUDA in this step: processes in different layers.

    On CPU the layers raise by themselves. Detectron2's trainer waits for the losses in every step,
    so that reading one flag more stalls nothing. Registered with Detectron2's inner trainer, before
    the divergence guard: what was mixed may be not finite, or no collective behind it may come to
    its end, and it is not to reach the optimizer.
    """

    def after_backward(self):
        raise_if_out_of_step()


class BatchScalars(HookBase):
    """Writes images seen, the mini-batch and the BN size, in images, beside the other metrics.

    And ``training_time``, the seconds of all iterations, hooks left out and resumes included: the
    ``time`` that Detectron2 writes is a median, which knows nothing of slow ones. Without a CGBN
    layer the BN size is 0, as the paper's Table 3 has it. Mini-batches whose statistics a CGBN
    layer did not take, since they were not finite, are counted and logged.
    """

    def __init__(self, effective_batch_size: int, images_per_gpu: int):
        self._effective_batch_size = effective_batch_size
        self._images_per_gpu = images_per_gpu
        self._seconds = 0.0

    def before_train(self):
        self._bn_size = images_per_group(self.trainer.model, self._images_per_gpu)
        layers = cgbn_layers(self.trainer.model)
        self._layers = [layer for layer in layers if layer.num_batches_skipped is not None]
        self._skipped = self._count()

    def before_step(self):
        self._began = time.perf_counter()

    def _count(self) -> list[int]:
        # Waits for the GPU, once.
        counters = [layer.num_batches_skipped for layer in self._layers]
        return torch.stack(counters).tolist() if counters else []

    def after_step(self):
        self._seconds += time.perf_counter() - self._began
        if is_due(self.trainer, PERIOD):
            before, self._skipped = self._skipped, self._count()
            self._warn(before)
            self.trainer.storage.put_scalar(
                "cgbn_skipped_batches", sum(self._skipped), smoothing_hint=False
            )
        self.trainer.storage.put_scalars(
            images_seen=self.trainer.images_seen,
            effective_batch_size=self._effective_batch_size,
            bn_size=self._bn_size,
            training_time=self._seconds,
            smoothing_hint=False,
        )

    def state_dict(self):
        return {"seconds": self._seconds}

    def load_state_dict(self, state_dict):
        self._seconds = state_dict["seconds"]

    def _warn(self, before: list[int]) -> None:
        grown = [
            f"{layer.name} {now - then}"
            for layer, then, now in zip(self._layers, before, self._skipped, strict=True)
            if now > then
        ]
        if grown:
            more = f" and {len(grown) - 5} layers more" if len(grown) > 5 else ""
            logger.warning(
                f"CGBN: until iteration {self.trainer.iter} statistics of mini-batches were not "
                f"finite, and not taken: {', '.join(grown[:5])}{more}"
            )


class CountSkippedImages(HookBase):
    """Logs the images that ``MEGDET.SKIP_BAD_IMAGES`` skipped, and counts them over all processes.

    The metric ``skipped_images`` is the number since training began or was resumed.

    Args:
        model: as it is called in training; its inputs say what was skipped for them.
    """

    def __init__(self, model: nn.Module):
        self._count = 0
        self._handle = model.register_forward_pre_hook(self._note)

    def _note(self, model, inputs):
        for image in inputs[0] if model.training else ():
            for reason in image.get("skipped", ()):
                self._count += 1
                logger.warning(f"MEGDET.SKIP_BAD_IMAGES: skipped {reason}")

    def after_step(self):
        if is_due(self.trainer, PERIOD):
            count = sum(comm.all_gather(self._count))
            self.trainer.storage.put_scalar("skipped_images", count, smoothing_hint=False)

    def after_train(self):
        self._handle.remove()


def is_due(trainer: TrainerBase, *periods: int) -> bool:
    """Whether the step that was made is the last, or ends a period; one of 0 never ends."""
    done = trainer.iter + 1
    return done >= trainer.max_iter or any(p > 0 and done % p == 0 for p in periods)
