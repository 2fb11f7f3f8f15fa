"""Runs a training step of a config on the largest images, and traces its memory."""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import SimpleTrainer
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints, PolygonMasks
from detectron2.utils.events import EventStorage
from torch import Tensor

from megdet_d2.engine.builders import Builders
from megdet_d2.engine.precision import build_inner_trainer
from megdet_d2.engine.sgd import set_sgd_implementation
from megdet_d2.norm.batch_norm import cgbn_layers

from .memory_trace import StepTrace

KINDS = ("parameters", "norm", "optimizer", "gradients", "activations", "workspace")


@dataclass(frozen=True)
class TracedStep:
    """The allocations of one training step after the first.

    Attributes:
        events: as in ``StepTrace``.
        kinds: as in ``StepTrace``, of ``KINDS``. A storage without a kind is an activation.
        start: index of the first event of the step. Those before it make what it starts with.
    """

    events: list[tuple[int, int]]
    kinds: dict[int, str]
    start: int

    def peak(self) -> dict[str, int]:
        """Returns the bytes of each kind when the step holds the most."""
        now = most = 0
        at = self.start
        for i, (_, size) in enumerate(self.events):
            now += size
            if i >= self.start and now > most:
                most, at = now, i
        parts = dict.fromkeys(KINDS, 0)
        for number, size in self.events[: at + 1]:
            parts[self.kinds.get(number, "activations")] += size
        return parts

    def bytes_of(self, kind: str) -> int:
        """Returns the bytes of a kind that exist before the step starts."""
        return sum(size for i, size in self.events[: self.start] if self.kinds.get(i) == kind)


def trace_step(
    cfg: CfgNode,
    images: int,
    size: tuple[int, int],
    objects: int,
    trainer: type[Builders],
    fake: bool = True,
) -> TracedStep:
    """Runs one training step and records its allocations.

    Args:
        cfg: a config for the CPU; see ``step_config``.
        images: images per micro-batch.
        size: height and width of each image.
        objects: ground-truth objects per image.
        trainer: builds the model and the optimizer.
        fake: False computes with real numbers, as slow and as large as a training.
    """
    with _quiet(), torch.random.fork_rng(devices=[]):
        model = trainer.build_model(cfg).train()
    trace = StepTrace()
    batch = make_batch(cfg, images, size, objects)
    if fake:
        trace.hide_weights(model)
        for image in batch:
            image["image"] = trace.hide(image["image"])
    optimizer = trainer.build_optimizer(cfg, model)
    set_sgd_implementation(optimizer, cfg.SOLVER.SGD_IMPLEMENTATION)
    inner = build_inner_trainer(SimpleTrainer(model, [batch] * 2, optimizer), cfg)
    inner.iter = 0
    generator = getattr(model, "proposal_generator", None)
    if generator is not None:
        truth = [image["instances"] for image in batch]
        generator.register_forward_hook(lambda *call: _like_trained(call[-1], truth))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    norms = {id(b) for layer in cgbn_layers(model) for b in layer.buffers(recurse=False)}
    with EventStorage(0), trace, torch.random.fork_rng(devices=[]):
        trace.label("parameters", model.parameters())
        for buffer in model.buffers():
            trace.label("norm" if id(buffer) in norms else "parameters", [buffer])
        trace.label("activations", _device_tensors(batch))
        for parameter in trained:  # the first step makes the optimizer's state, later ones find it
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        trace.label("optimizer", _tensors(optimizer.state.values()))
        trace.label("gradients", (p.grad for p in trained if p.grad is not None))
        start = len(trace.events)
        inner.run_step()
        trace.label("gradients", (p.grad for p in trained if p.grad is not None))
        return TracedStep(list(trace.events), dict(trace.kinds), start)


def make_batch(
    cfg: CfgNode, images: int, size: tuple[int, int], objects: int
) -> list[dict[str, Any]]:
    """Returns images of one size, with the ground truth that the config's model takes."""
    generator = torch.Generator().manual_seed(0)
    height, width = size
    batch = []
    for _ in range(images):
        extent = torch.tensor([width, height])
        corners = torch.rand(objects, 2, generator=generator) * extent * 0.6
        sides = (0.05 + 0.3 * torch.rand(objects, 2, generator=generator)) * extent
        boxes = torch.cat([corners, corners + sides], dim=1)
        classes = torch.zeros(objects, dtype=torch.int64)
        truth = Instances(size, gt_boxes=Boxes(boxes), gt_classes=classes)
        if cfg.MODEL.MASK_ON:
            truth.set("gt_masks", _masks(cfg.INPUT.MASK_FORMAT, boxes, size))
        if cfg.MODEL.KEYPOINT_ON:
            number = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
            truth.set("gt_keypoints", _keypoints(boxes, number))
        image = torch.zeros(3, height, width, dtype=torch.uint8)
        batch.append(
            {
                "image": image,
                "instances": truth,
                "height": height,
                "width": width,
                "sem_seg": torch.zeros(height, width, dtype=torch.int64),
            }
        )
    return batch


def _masks(kind: str, boxes: Tensor, size: tuple[int, int]) -> PolygonMasks | BitMasks:
    if kind == "bitmask":
        return BitMasks(torch.ones(len(boxes), *size, dtype=torch.bool))
    rectangles = boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].double().numpy()
    return PolygonMasks([[rectangle] for rectangle in rectangles])


def _keypoints(boxes: Tensor, number: int) -> Keypoints:
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    visible = torch.full((len(boxes), 1), 2.0)
    return Keypoints(torch.cat([centres, visible], 1)[:, None].repeat(1, number, 1))


def _like_trained(output: Any, truth: Sequence[Instances]) -> Any:
    """Replaces the fake proposals of an RPN by real ones, half of them close to the objects.

    So the heads get as many regions of objects as they sample at most, like those of a trained RPN.
    """
    proposals, losses = output
    if proposals is None or not all(image.has("proposal_boxes") for image in proposals):
        return output
    generator = torch.Generator().manual_seed(0)
    made = []
    for image, objects in zip(proposals, truth, strict=True):
        number, boxes = len(image), objects.gt_boxes.tensor
        height, width = image.image_size
        corners = torch.rand(number, 2, generator=generator) * torch.tensor([width, height]) * 0.9
        random = torch.cat([corners, corners + 8], 1)
        if len(boxes):
            near = boxes[torch.arange(number // 2) % len(boxes)]
            sides = (near[:, 2:] - near[:, :2]).repeat(1, 2)
            random[: number // 2] = near + 0.05 * sides * torch.rand(
                near.shape, generator=generator
            )
        fields = {
            **image.get_fields(),
            "proposal_boxes": Boxes(random),
            "objectness_logits": torch.zeros(number),
        }
        made.append(Instances(image.image_size, **fields))
    return made, losses


def _device_tensors(batch: Sequence[dict[str, Any]]) -> Iterator[Tensor]:
    """Yields what a batch takes on the model's device: pixels, and masks that are bitmaps."""
    for image in batch:
        yield image["image"]
        masks = image["instances"].get_fields().get("gt_masks")
        if isinstance(masks, BitMasks):
            yield masks.tensor


def _tensors(states: Any) -> Iterator[Tensor]:
    for state in states:
        yield from (value for value in state.values() if isinstance(value, Tensor))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides the log of building a model, which is built once per setting."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)
