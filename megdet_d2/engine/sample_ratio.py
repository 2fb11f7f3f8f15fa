"""The ratio of positive and negative samples (Table 1), over all processes, for each epoch.

The paper's "ratio" may be Σ positives / Σ negatives, or the mean over images of positives /
negatives; of the anchors that train the RPN, or of the proposals that train the R-CNN. All four
are recorded, in percent.
"""

import contextlib
import csv
import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from megdet_d2.schedule.phases import Phases

from .hooks import StepObserver, is_due

# epoch: {mini-batch: the paper's ratio in percent}
PAPER = {1: {16: 5.58, 256: 9.82}, 6: {16: 11.77, 256: 16.11}, 12: {16: 16.59, 256: 16.91}}
STAGES = ("rpn", "rcnn")
FILE = "samples.csv"
COLUMNS = ("epoch", "images") + tuple(
    f"{stage}_{column}"
    for stage in STAGES
    for column in ("positives", "negatives", "ratio", "mean_ratio")
)
_NEITHER = -1  # the label of an anchor or proposal without a loss
# Per stage: images, Σ positives, Σ negatives, Σ positives / negatives, and the images in the last.
_SUMS = 5


def count_samples(positive: Tensor, negative: Tensor) -> Tensor:
    """Returns the sums of one stage over images.

    Args:
        positive, negative: (images, samples) bool masks of the positive and negative samples.

    Returns:
        (5,) float64 on the masks' device: images, Σ positives, Σ negatives, Σ ratio, and the images
        in that last sum. An image without a negative sample has no ratio.
    """
    positives, negatives = positive.sum(1).double(), negative.sum(1).double()
    has_ratio = negatives > 0
    ratios = torch.where(has_ratio, positives / negatives, 0.0)
    images = torch.full_like(positives[0], len(positives))
    return torch.stack([images, positives.sum(), negatives.sum(), ratios.sum(), has_ratio.sum()])


def ratios(sums: Sequence[float]) -> tuple[float, float]:
    """Returns ratio of sums and mean of ratios of one stage, in percent; NaN without samples.

    Args:
        sums: the five sums of ``count_samples``.
    """
    _, positives, negatives, total, images = (float(value) for value in sums)
    return (
        100 * positives / negatives if negatives else float("nan"),
        100 * total / images if images else float("nan"),
    )


class SampleRecorder(StepObserver):
    """Records Table 1 while a two-stage detector trains. Register it in every process.

    Every ``period`` iterations it writes the scalars samples/{rpn,rcnn}_{ratio,mean_ratio} of the
    images since then, and after every epoch a line of samples.csv. The sums stay on the device.
    They are reduced over the processes only then and before a periodic checkpoint, which holds
    them: ten numbers. For a detector of one stage nothing is recorded.

    Only an update's images count, and each once: no forward between two updates or under
    ``no_grad``, such as that of a validation loss, and no second forward of the same update.

    Args:
        output_dir: folder in which the main process writes samples.csv.
        phases: the images of each iteration, over all processes.
        images_per_epoch: None for a config without epochs, for which no file is written.
        checkpoint_period: iterations between two checkpoints; 0 for none.
        period: iterations between two scalars; Detectron2's writers use 20.
    """

    def __init__(
        self,
        output_dir: str,
        phases: Phases,
        images_per_epoch: float | None = None,
        checkpoint_period: int = 0,
        period: int = 20,
    ):
        self._path = os.path.join(output_dir, FILE)
        self._phases = phases
        self._images_per_epoch = images_per_epoch
        self._period = period
        self._checkpoint_period = checkpoint_period
        self._pending: dict[str, Tensor] = {}
        self._left: dict[str, int] = {}  # images of this update and process that are not counted
        self._epoch: list[list[float]] = _nothing()
        self._since: list[list[float]] = _nothing()  # the last scalars
        self._lines: list[list[float]] = []
        self._observed: list[tuple[nn.Module, str, Callable]] = []

    def before_train(self) -> None:
        """Finds the methods that label the model's anchors and proposals."""
        self._observed = []
        model = self.trainer.model
        model = getattr(model, "module", model)  # out of DDP
        generator: Any = getattr(model, "proposal_generator", None)
        heads: Any = getattr(model, "roi_heads", None)
        # Only these methods have the labels of one image; Detectron2 logs a mean over the process's
        # images. They are replaced on these two objects during each step.
        if hasattr(generator, "label_and_sample_anchors"):
            name = "label_and_sample_anchors"
            self._wrap("rpn", generator, name, _anchor_labels, _anchor_masks)
        if hasattr(heads, "label_and_sample_proposals"):
            name = "label_and_sample_proposals"
            masks = functools.partial(_proposal_masks, num_classes=heads.num_classes)
            self._wrap("rcnn", heads, name, _proposal_labels, masks)

    @contextlib.contextmanager
    def observe(self) -> Iterator[None]:
        """Counts the labels that the model's methods return for the images of one update."""
        self._begin_update()
        self._before = dict(self._pending)
        with contextlib.ExitStack() as restore:
            for module, name, observed in self._observed:
                restore.callback(_put_back, module, name, vars(module).get(name))
                setattr(module, name, observed)
            yield

    def forget_step(self) -> None:
        """Takes the samples of this update from the sums."""
        self._begin_update()
        self._pending = dict(self._before)

    def _begin_update(self) -> None:
        images = math.ceil(self._phases.batch_size(self.trainer.iter) / comm.get_world_size())
        self._left = {stage: images for stage in STAGES}

    def _wrap(
        self, stage: str, module: nn.Module, name: str, find: Callable, read: Callable
    ) -> None:
        method = getattr(module, name)

        @functools.wraps(method)
        def observed(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            labels = find(result)[: self._left.get(stage, 0)] if torch.is_grad_enabled() else []
            if labels:
                self._left[stage] -= len(labels)
                # Images differ in their number of samples; what is added is neither.
                sums = count_samples(*read(pad_sequence(labels, True, _NEITHER)))
                self._pending[stage] = self._pending.get(stage, 0) + sums
            return result

        self._observed.append((module, name, observed))

    def after_step(self) -> None:
        """Reduces and writes, where a period or an epoch ends."""
        done = self.trainer.iter + 1
        is_last = done >= self.trainer.max_iter
        ends_epoch = self._epochs(done) != self._epochs(done - 1)
        if not self._observed:
            return
        if ends_epoch or is_due(self.trainer, self._period, self._checkpoint_period):
            self.reduce()
        if is_due(self.trainer, self._period):
            self._write_scalars()
        if ends_epoch or (is_last and any(sums[0] for sums in self._epoch)):
            self._write_epoch(self._epochs(done - 1) + 1)

    def _epochs(self, done: int) -> int:
        """Returns the whole epochs in ``done`` iterations."""
        if self._images_per_epoch is None:
            return 0
        # Rounded, since images_per_epoch may be a quotient: 10.999999999 epochs are 11.
        return int(round(self._phases.images(done) / self._images_per_epoch, 9))

    def reduce(self) -> None:
        """Adds up the counts of all processes since the last call. Every process has to call it."""
        device = next(self.trainer.model.parameters()).device
        none = torch.zeros(_SUMS, dtype=torch.float64, device=device)
        sums = torch.stack([self._pending.pop(stage, none).to(device) for stage in STAGES])
        if comm.get_world_size() > 1:
            dist.all_reduce(sums)
        sums = sums.cpu()
        self._epoch = (torch.tensor(self._epoch, dtype=sums.dtype) + sums).tolist()
        self._since = (torch.tensor(self._since, dtype=sums.dtype) + sums).tolist()

    def _write_scalars(self) -> None:
        for stage, sums in zip(STAGES, self._since, strict=True):
            if sums[0]:
                of_sums, of_ratios = ratios(sums)
                self.trainer.storage.put_scalars(
                    **{
                        f"samples/{stage}_ratio": of_sums,
                        f"samples/{stage}_mean_ratio": of_ratios,
                    },
                    smoothing_hint=False,
                )
        self._since = _nothing()

    def _write_epoch(self, epoch: int) -> None:
        line: list[float] = [epoch, max(sums[0] for sums in self._epoch)]
        for sums in self._epoch:
            line += [sums[1], sums[2], *ratios(sums)]
        self._epoch = _nothing()
        self._lines.append(line)
        if self._images_per_epoch is not None and comm.is_main_process():
            with open(self._path, "w", newline="") as file:
                csv.writer(file).writerows([COLUMNS, *self._lines])

    def state_dict(self) -> dict[str, Any]:
        """Returns the epoch so far and the lines before it, which a resumed run writes again."""
        return {"epoch": self._epoch, "since": self._since, "lines": self._lines}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the result of ``state_dict``."""
        self._epoch, self._since, self._lines = state["epoch"], state["since"], state["lines"]


def read_samples(run: str | Path) -> list[dict[str, float]]:
    """Returns the lines of a run's samples.csv by ``COLUMNS``; [] if there is no such file.

    Args:
        run: OUTPUT_DIR of a training.
    """
    path = Path(run) / FILE
    if not path.is_file():
        return []
    with open(path, newline="") as file:
        rows = [row for row in csv.DictReader(file) if None not in row.values()]  # whole lines
    return [{key: float(value) for key, value in row.items()} for row in rows]


def _put_back(module: nn.Module, name: str, own: Any) -> None:
    # ``own`` is a method that a project has set on this object; usually the class has it.
    if own is None:
        delattr(module, name)
    else:
        setattr(module, name, own)


def _nothing() -> list[list[float]]:
    return [[0.0] * _SUMS for _ in STAGES]


def _anchor_labels(result: Any) -> list[Tensor]:
    return list(result[0])


def _anchor_masks(labels: Tensor) -> tuple[Tensor, Tensor]:
    return labels == 1, labels == 0


def _proposal_labels(result: Any) -> list[Tensor]:
    return [proposals.gt_classes for proposals in result]


def _proposal_masks(classes: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    # The class after the last is background.
    return (classes >= 0) & (classes < num_classes), classes == num_classes
