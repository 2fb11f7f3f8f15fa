"""Table 1's recorder: its arithmetic by hand, its counts against Detectron2's own, by process."""

import math

import pytest
import torch
from detectron2.engine import HookBase, SimpleTrainer
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from megdet_d2.engine import Trainer, prepare_config
from megdet_d2.engine.hooks import observed_step
from megdet_d2.engine.sample_ratio import (
    COLUMNS,
    PAPER,
    SampleRecorder,
    count_samples,
    ratios,
    read_samples,
)
from megdet_d2.schedule.phases import Phases
from tests.helpers import training
from tests.helpers.models import tiny_config

COUNTERS = {
    "rpn": ("rpn/num_pos_anchors", "rpn/num_neg_anchors"),
    "rcnn": ("roi_head/num_fg_samples", "roi_head/num_bg_samples"),
}


def masks(*images):
    """The masks of images of (positives, negatives, ignored) samples."""
    rows = [torch.tensor([1] * p + [0] * n + [-1] * sum(rest)) for p, n, *rest in images]
    labels = torch.nn.utils.rnn.pad_sequence(rows, True, -1)
    return labels == 1, labels == 0


def test_sums_and_ratios_by_hand():
    sums = count_samples(*masks((1, 9), (30, 70, 5)))
    assert sums.tolist() == [2, 31, 79, pytest.approx(1 / 9 + 3 / 7), 2]
    of_sums, of_ratios = ratios(sums.tolist())
    assert of_sums == pytest.approx(100 * 31 / 79)
    assert of_ratios == pytest.approx(100 * (1 / 9 + 3 / 7) / 2)


def test_an_image_without_negatives_has_no_ratio_of_its_own():
    sums = count_samples(*masks((4, 0), (1, 4)))
    assert ratios(sums.tolist()) == (pytest.approx(125), pytest.approx(25))
    assert all(math.isnan(value) for value in ratios(count_samples(*masks((3, 0))).tolist()))


def test_the_papers_table():
    """Table 1: epoch, batch size, ratio (%)."""
    table = [(1, 16, 5.58), (1, 256, 9.82), (6, 16, 11.77), (6, 256, 16.11)]
    table += [(12, 16, 16.59), (12, 256, 16.91)]
    found = [(epoch, n, ratio) for epoch, row in PAPER.items() for n, ratio in row.items()]
    assert sorted(found) == table


class Spy(HookBase):
    """What Detectron2 itself counted in this process, image by image of its mean."""

    def __init__(self, images):
        self._images, self.counts = images, []

    def after_step(self):
        latest = self.trainer.storage.latest()
        self.counts.append(
            {
                stage: [latest[key][0] * self._images for key in keys]
                for stage, keys in COUNTERS.items()
            }
        )


def make_batch(images, generator):
    def image():
        corner = 40 * torch.rand(3, 2, generator=generator)
        size = 8 + 16 * torch.rand(3, 2, generator=generator)
        truth = Instances((64, 64), gt_boxes=Boxes(torch.cat([corner, corner + size], 1)))
        truth.gt_classes = torch.randint(10, (3,), generator=generator)
        pixels = torch.randint(256, (3, 64, 64), generator=generator, dtype=torch.uint8)
        return {"image": pixels, "instances": truth, "height": 64, "width": 64}

    return [image() for _ in range(images)]


class ObservingTrainer(SimpleTrainer):
    """Lets the hooks watch each step, as megdet_d2's Trainer does."""

    def run_step(self):
        with observed_step(self._hooks):
            super().run_step()


def train(rank, output, iterations, images_per_epoch, period, state=None, start=0, saves=0):
    """Trains rank + 1 images a step, so that a mean over processes is no mean over images."""
    torch.manual_seed(rank)
    norms = [f"MODEL.{part}.NORM" for part in ("RESNETS", "FPN", "ROI_BOX_HEAD")]
    model = build_model(tiny_config(*(word for key in norms for word in (key, "BN"))))
    generator = torch.Generator().manual_seed(rank)
    batches = [make_batch(rank + 1, generator) for _ in range(iterations)][start:]
    trainer = ObservingTrainer(model, batches, torch.optim.SGD(model.parameters(), lr=1e-4))
    images = sum(len(batch) for batch in batches[:1])
    recorder = SampleRecorder(output, Phases((0,), (3,)), images_per_epoch, saves, period)
    if state:
        recorder.load_state_dict(state)
    spy = Spy(images)
    reductions = []
    reduce = recorder.reduce
    recorder.reduce = lambda: (reductions.append(trainer.iter), reduce())
    trainer.register_hooks([recorder, spy])
    trainer.train(start, iterations)
    for module in (model.proposal_generator, model.roi_heads):
        assert not [name for name in vars(module) if name.startswith("label_and_sample")]
    latest = {k: v for k, (v, _) in trainer.storage.latest().items() if k.startswith("samples/")}
    return spy.counts, latest, reductions, recorder.state_dict()


def test_counts_are_detectron2s_over_all_processes(pool2, tmp_path):
    # 3 images a step, 12 an epoch: epochs end after steps 4 and 8, the third is cut off after 10.
    replies = pool2.run(train, str(tmp_path), 10, 12.0, 3)
    lines = read_samples(tmp_path)
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert [line["images"] for line in lines] == [12, 12, 6]
    assert set(lines[0]) == set(COLUMNS)
    for line, steps in zip(lines, (range(4), range(4, 8), range(8, 10)), strict=True):
        for stage in COUNTERS:
            positives, negatives = (
                sum(counts[step][stage][i] for counts, *_ in replies for step in steps)
                for i in range(2)
            )
            assert line[f"{stage}_positives"] == pytest.approx(positives) and positives > 0
            assert line[f"{stage}_negatives"] == pytest.approx(negatives) and negatives > 0
            assert line[f"{stage}_ratio"] == pytest.approx(100 * positives / negatives)
            assert line[f"{stage}_mean_ratio"] > 0
    (_, latest, reductions, _), (_, others, *_) = replies
    assert latest == others and set(latest) == {
        f"samples/{stage}_{kind}" for stage in COUNTERS for kind in ("ratio", "mean_ratio")
    }
    # By period and at the ends of epochs and of training, not every step.
    assert reductions == [2, 3, 5, 7, 8, 9]
    # The scalars are of the images since those before: the last step.
    positives, negatives = (sum(counts[9]["rpn"][i] for counts, *_ in replies) for i in range(2))
    assert latest["samples/rpn_ratio"] == pytest.approx(100 * positives / negatives)


def test_one_process_resumed_within_an_epoch(tmp_path):
    _, _, _, state = train(0, str(tmp_path), 6, 12.0, 2)  # an epoch of 4 steps, and 2 of the next
    # As in a checkpoint after step 6 of more: training has not ended, and the epoch goes on.
    open_epoch = [[2.0, 3.0, 4.0, 0.5, 2.0], [2.0, 1.0, 4.0, 0.5, 2.0]]
    state = {"epoch": open_epoch, "since": open_epoch, "lines": state["lines"][:1]}
    first = read_samples(tmp_path)[0]
    train(0, str(tmp_path), 8, 12.0, 2, state, start=6)
    lines = read_samples(tmp_path)
    assert [line["epoch"] for line in lines] == [1, 2] and lines[0] == first
    assert lines[1]["images"] == 4 and lines[1]["rpn_positives"] > 3


def test_checkpoints_hold_all_until_them_and_change_no_scalar(tmp_path):
    _, plain, _, _ = train(0, str(tmp_path), 6, None, 6)
    _, saved, reductions, _ = train(0, str(tmp_path), 6, None, 6, saves=2)
    assert saved == pytest.approx(plain) and reductions == [1, 3, 5]


def test_without_epochs_there_are_scalars_alone(tmp_path):
    _, latest, reductions, _ = train(0, str(tmp_path), 3, None, 2)
    assert len(latest) == 4 and reductions == [1, 2]
    assert read_samples(tmp_path) == []


class ValidationLoss(HookBase):
    """As many projects have it: the loss of other images, in training mode, on each process."""

    def __init__(self, images, where, grad):
        self._batch = make_batch(images, torch.Generator().manual_seed(7))
        for image in self._batch:
            image["instances"].gt_classes.zero_()
        self._grad = grad
        setattr(self, where, self._forward)

    def _forward(self):
        with torch.set_grad_enabled(self._grad):
            sum(float(loss.detach()) for loss in self.trainer.model(self._batch).values())


class Sharpness(Trainer):
    """Passes every batch through the model twice, as sharpness-aware minimisation does."""

    def run_step(self):
        batch = next(self._trainer._data_loader_iter)
        for _ in range(2):
            self.optimizer.zero_grad()
            sum(self.model(batch).values()).backward()
        self._trainer.after_backward()
        self.optimizer.step()


def recorded(rank, output, coco, kind=Trainer, hook=None, overrides=()):
    cfg = training.config(output, coco, *overrides)
    prepare_config(cfg)
    trainer = kind(cfg)
    if hook:
        trainer.register_hooks([ValidationLoss(*hook)])
    trainer.resume_or_load(False)
    trainer.train()
    return read_samples(output)


@pytest.mark.parametrize("hook", [
    (3, "after_step", False), (3, "after_step", True), (3, "before_step", False),
    (3, "before_step", True), (8, "before_step", True),
])  # fmt: skip
def test_other_forwards_are_not_counted(coco, tmp_path, hook):
    """Their images change the running statistics only, as in Detectron2, and no sample."""
    alone = recorded(0, str(tmp_path / "alone"), coco)
    beside = recorded(0, str(tmp_path / "beside"), coco, Trainer, hook)
    assert [line["images"] for line in beside] == [line["images"] for line in alone] == [24, 24]
    # The first update's labels do not depend on running statistics at all.
    for key in ("rpn_positives", "rpn_negatives"):
        assert [line[key] for line in beside] == [line[key] for line in alone]


@pytest.mark.parametrize("overrides", [(), ("MODEL.SUBLINEAR.ENABLED", True,
    "MODEL.SUBLINEAR.STAGES", ("rpn", "roi_heads"))])  # fmt: skip
def test_each_image_of_an_update_counts_once(coco, tmp_path, overrides):
    lines = recorded(0, str(tmp_path / "twice"), coco, Sharpness, None, overrides)
    assert [line["images"] for line in lines] == [24, 24]


def test_other_forwards_on_two_processes(pool2, coco, tmp_path):
    hook = (2, "after_step", False)
    lines = pool2.run(recorded, str(tmp_path), coco, Trainer, hook,
                      ("MEGDET.ACCUMULATION_STEPS", 2), timeout=120)[0]  # fmt: skip
    assert [line["images"] for line in lines] == [24, 24]
