"""Loaders and steps of a user's own: each update takes the config's images, or it is said."""

import itertools

import pytest
import torch
from detectron2.data import DatasetMapper, build_detection_train_loader
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm

from megdet_d2.engine import Trainer, prepare_config
from megdet_d2.engine.minibatch import count_images
from tests.helpers.training import config

HALVES = ("MEGDET.ACCUMULATION_STEPS", 2)


class Tutorial(Trainer):
    """As in Detectron2's tutorial on data loading."""

    @classmethod
    def build_train_loader(cls, cfg):
        return build_detection_train_loader(cfg, mapper=DatasetMapper(cfg, is_train=True))


class HardCoded(Trainer):
    @classmethod
    def build_train_loader(cls, cfg):
        return build_detection_train_loader(cfg, total_batch_size=6, num_workers=0)


class OwnStep(Trainer):
    """Makes the update itself, from the loader of the inner trainer."""

    def run_step(self):
        batch = next(self._trainer._data_loader_iter)
        losses = self.model(batch)
        self.optimizer.zero_grad()
        sum(losses.values()).backward()
        self._trainer.after_backward()
        self.optimizer.step()


class TwoBatches(Trainer):
    def run_step(self):
        next(self._trainer._data_loader_iter)
        super().run_step()


class OwnIterator(Trainer):
    def before_train(self):
        super().before_train()
        self.batches = iter(self.data_loader)

    def run_step(self):
        sum(self.model(next(self.batches)).values()).backward()
        self._trainer.after_backward()


class OwnInnerTrainer(Trainer):
    """Builds another inner trainer after the constructor, and loses the accumulation."""

    def before_train(self):
        super().before_train()
        self._trainer = SimpleTrainer(self.model, self.data_loader, self.optimizer)


class Shrinking(Trainer):
    """A loader whose batches after the third are smaller, and whose first may be."""

    first = 0

    @classmethod
    def build_train_loader(cls, cfg):
        loader = super().build_train_loader(cfg)

        class Loader:
            def __iter__(self):
                for i, batch in enumerate(loader):
                    yield batch[: 5 if i >= 3 else 8]

        return Loader()


class Tuples(Trainer):
    """Two lists of images a batch, as in semi-supervised training; the model gets the first."""

    @classmethod
    def build_train_loader(cls, cfg):
        loader = super().build_train_loader(cfg)
        return ((batch, batch) for batch in loader)

    def run_step(self):
        sum(self.model(next(self._trainer._data_loader_iter)[0]).values()).backward()
        self._trainer.after_backward()


def run(rank, kind, output, coco, overrides=()):
    cfg = config(output, coco, *overrides)
    prepare_config(cfg)
    trainer = kind(cfg)
    trainer.resume_or_load(False)
    taken = []
    trainer.model.register_forward_pre_hook(lambda _, inputs: taken.append(len(inputs[0])))
    error = ""
    try:
        trainer.train()
    except ValueError as raised:
        error = str(raised)
    return {"error": error, "taken": taken, "seen": trainer.images_seen, "iter": trainer.iter}


@pytest.mark.parametrize(("kind", "overrides", "images"), [
    (Tutorial, HALVES, (8, 4)), (Tutorial, ("MEGDET.ACCUMULATION_STEPS", 4), (8, 2)),
    (HardCoded, (), (6, 8)), (HardCoded, HALVES, (6, 4)),
])  # fmt: skip
def test_a_loader_of_another_batch_is_an_error_before_it_trains(
    coco, tmp_path, kind, overrides, images
):
    result = run(0, kind, str(tmp_path), coco, overrides)
    assert not result["taken"] and result["seen"] == 0
    assert f"yielded {images[0]} images where the config says {images[1]}" in result["error"]
    for word in (kind.__name__, "IMS_PER_BATCH 8", "ACCUMULATION_STEPS", "build_mapper"):
        assert word in result["error"]


def test_the_same_on_two_processes(pool2, coco, tmp_path):
    results = pool2.run(run, Tutorial, str(tmp_path), coco, HALVES, timeout=120)
    for result in results:
        assert "yielded 4 images where the config says 2" in result["error"] and not result["taken"]


@pytest.mark.parametrize("kind", [Tutorial, OwnStep])
def test_what_fits_trains_without_a_word(coco, tmp_path, caplog, kind):
    """A run_step without a call of its parent counts images too."""
    result = run(0, kind, str(tmp_path), coco)
    assert not result["error"] and set(result["taken"]) == {8}
    assert result["seen"] == sum(result["taken"]) == 48
    assert not [r for r in caplog.records if kind.__name__ in r.getMessage()]


@pytest.mark.parametrize("kind", [OwnStep, OwnInnerTrainer])
def test_accumulation_without_effect_is_an_error(coco, tmp_path, kind):
    result = run(0, kind, str(tmp_path), coco, HALVES)
    assert f"{kind.__name__}: an update has taken 1 batches" in result["error"]
    assert "ACCUMULATION_STEPS is 2" in result["error"] and len(result["taken"]) == 1


@pytest.mark.parametrize(("kind", "words"), [
    (TwoBatches, "an update has taken 2 batches of the training loader"),
    (OwnIterator, "run_step does not read the trainer's loader"),
    (Shrinking, "yielded 5 images where the config says 8"),
    (Tuples, "yields a tuple of list, whose images cannot be counted"),
])  # fmt: skip
def test_what_stock_detectron2_trains_on_trains_with_a_warning(coco, tmp_path, caplog, kind, words):
    result = run(0, kind, str(tmp_path), coco)
    assert not result["error"] and result["iter"] == 6
    said = [r.getMessage() for r in caplog.records if words in r.getMessage()]
    assert len(said) == 1 and kind.__name__ in said[0] and "images_seen" in said[0]


def test_batches_whose_images_can_be_counted():
    image = torch.zeros(3, 4, 4)
    assert count_images([{"image": image}] * 3) == 3
    assert count_images([image] * 2) == 2
    assert count_images(torch.zeros(5, 3, 4, 4)) == 5
    for other in (([{}], [{}]), (image, image), {"image": image}, [[{}], [{}]], None):
        assert count_images(other) is None


def mapped(rank, output, coco):
    cfg = config(output, coco, *HALVES)
    prepare_config(cfg)
    mapper = DatasetMapper(cfg, is_train=True)
    loader = Trainer.build_train_loader(cfg, mapper=mapper)
    return [[i["image_id"] for i in b] for b in itertools.islice(loader, 3)], comm.get_rank()


def test_a_mapper_takes_the_micro_batches_of_the_layout(pool2, coco, tmp_path):
    (first, _), (second, _) = pool2.run(mapped, str(tmp_path), coco)
    assert [len(batch) for batch in first + second] == [2] * 6
