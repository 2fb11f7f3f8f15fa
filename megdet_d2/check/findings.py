"""Finds everything that is wrong with a data set and with a config that trains on it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

from megdet_d2.config import merge_overrides
from megdet_d2.data import Finding, Inspection, inspect_datasets, register_coco
from megdet_d2.data.annotations import find_annotation_faults
from megdet_d2.data.coco import unregister_coco
from megdet_d2.engine.advice import count_images, find_schedule_faults
from megdet_d2.engine.check_config import check_keys
from megdet_d2.engine.input_keys import find_input_faults
from megdet_d2.schedule.build import scale_config, scheduled_images

from .boxes import BoxSizes, find_anchor_faults, measure_boxes


@dataclass(frozen=True)
class Check:
    """A check of one data set.

    Attributes:
        cfg: the config that trains on the data set alone; its schedule is resolved if it can be.
        has_config: False if the user gave neither a config nor a key.
        inspection: what is known of the data set.
        findings: everything that is wrong.
        schedule: by name, what follows from the config; empty without one.
        boxes: the sizes of the boxes; None without any.
    """

    cfg: CfgNode
    has_config: bool
    inspection: Inspection
    findings: list[Finding]
    schedule: dict[str, Any] = field(default_factory=dict)
    boxes: BoxSizes | None = None

    @property
    def refused(self) -> bool:
        """Returns True if a training would be refused."""
        return any(finding.level == "error" for finding in self.findings)


def check(
    json_file: str, image_root: str, cfg: CfgNode, opts: Sequence[str] = (), has_config: bool = True
) -> Check:
    """Checks a data set as a training set of a config.

    Args:
        json_file, image_root: annotations and images.
        cfg: a config, not resolved; changed in place to train on this data set alone.
        opts: KEY VALUE ..., merged into ``cfg``.
        has_config: False to check the data set alone, without keys of the model and the schedule.

    Raises:
        ValueError: ``opts`` are not valid.
    """
    merge_overrides(cfg, opts)
    name = _free_name(json_file)
    cfg.DATASETS.COCO = [[name, json_file, image_root]]
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (name,), ()
    keypoints, cfg.MODEL.KEYPOINT_ON = cfg.MODEL.KEYPOINT_ON, False  # DATASETS.COCO has none
    register_coco(cfg.DATASETS.COCO, cfg.MODEL.MASK_ON)
    try:
        inspections = inspect_datasets(cfg, ("TRAIN",))
    finally:
        cfg.MODEL.KEYPOINT_ON = keypoints
        unregister_coco(name)
    findings = [finding for item in inspections for finding in item.findings]
    inspection = next(item for item in inspections if item.name == name)
    findings += _find_evaluation_faults(cfg, json_file, inspection)
    boxes = measure_boxes(cfg, inspection.coco)
    if not has_config:
        findings = [finding for finding in findings if finding.kind != "num-classes"]
        return Check(cfg, False, inspection, findings, boxes=boxes)
    if boxes:
        findings += find_anchor_faults(cfg, boxes)
    findings += _refusal(lambda: check_keys(cfg))
    findings += find_input_faults(cfg)
    num_images, schedule = count_images(cfg, inspections), {}
    if num_images or cfg.MEGDET.EPOCH_IMAGES or not cfg.MEGDET.POLICY:
        refusal = _refusal(lambda: scale_config(cfg, num_images, world_size=1))
        findings += refusal or find_schedule_faults(cfg, num_images)
        schedule = {} if refusal else _schedule(cfg, num_images)
    return Check(cfg, True, inspection, findings, schedule, boxes)


def _free_name(json_file: str) -> str:
    name = Path(json_file).stem
    return f"{name} (checked)" if name in DatasetCatalog.list() else name


def _find_evaluation_faults(
    cfg: CfgNode, json_file: str, inspection: Inspection
) -> Iterator[Finding]:
    """Yields as warnings what only an evaluation on the data set would refuse."""
    coco = inspection.coco
    if not coco or not coco.get("annotations"):
        return
    known = [(finding.kind, finding.ids) for finding in inspection.findings]
    faults = find_annotation_faults(
        "As a test set",
        json_file,
        coco,
        trained=False,
        evaluated=True,
        masks="bitmask" if cfg.MODEL.MASK_ON else "",
    )[0]
    for finding in faults:
        if (finding.kind, finding.ids) not in known:
            yield replace(finding, level="warning")


def _refusal(step: Callable[[], Any]) -> list[Finding]:
    """Returns the error of a check of the config as a finding; none without an error."""
    try:
        step()
    except (FileNotFoundError, ValueError) as error:
        problem, _, fix = str(error).rpartition("; ")
        return [Finding("error", "config", "the config", "", problem or fix, fix)]
    return []


def _schedule(cfg: CfgNode, num_images: int | None) -> dict[str, Any]:
    """Returns the schedule of a config, by the words of its table."""
    solver = cfg.SOLVER
    epoch = cfg.MEGDET.EPOCH_IMAGES or num_images
    return {
        "iterations": solver.MAX_ITER,
        "epochs": scheduled_images(cfg) / epoch if epoch else None,
        "images per epoch": epoch,
        "mini-batch": solver.IMS_PER_BATCH,
        "learning rate": solver.BASE_LR,
        "warm-up iterations": solver.WARMUP_ITERS,
        "decays at": list(solver.STEPS),
    }
