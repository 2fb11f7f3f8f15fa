"""Runs ``megdet plan CONFIG``: reads the config, searches the settings, prints and draws them."""

import argparse
import functools
import json
from dataclasses import replace
from typing import Any

import torch
from detectron2.config import CfgNode

from megdet_d2.config import load_config
from megdet_d2.engine.check_config import check_keys
from megdet_d2.engine.command import find_config

from . import hardware as devices
from .advice import find_warnings
from .epochs import PRESETS, EpochModel
from .evaluation_time import describe_evaluations
from .flops import count
from .growth import draw
from .hardware import Hardware
from .memory import Memory, MemoryModel
from .plan_tables import to_text
from .question import Question
from .resolved import launch_line, refuse_batch_warmup
from .search import Found, Search, Setting
from .topology import network
from .training_images import count_images
from .without_gpus import without_gpus

GPUS = 8
"""GPUs of a machine where this one has none."""


def run(args: argparse.Namespace) -> None:
    """Runs the command with the arguments of ``megdet_cli.plan``.

    Raises:
        FileNotFoundError, ValueError: the config, the data or a flag has an error, or nothing fits.
    """
    plan = Plan(args)
    found = plan.search.run()
    chosen = choose(found.settings, args.rows)
    if not chosen:
        raise ValueError(describe_need(plan.question, found))
    if args.json:
        print(json.dumps(plan.to_json(chosen, found), indent=1))
    else:
        print(
            to_text(plan.introduction(), chosen, found, plan.warnings(chosen), plan.lines(chosen))
        )
    if args.report:
        path = draw(plan.search, chosen[0], args.output)
        if not args.json:
            print(f"\nPlot: {path}")


class Plan:
    """The parts of a plan.

    Args:
        args: of ``megdet_cli.plan``.

    Attributes:
        question: the config, the data and the cluster.
        search: the search for it.
    """

    def __init__(self, args: argparse.Namespace):
        check_flags(args)
        self.args = args
        cfg = load_config(find_config(args.config), args.opts)
        check(cfg)
        self.images = count_images(cfg, args.images)
        hardware, self.chosen = devices.find(args.hardware)
        if args.measure is not None:
            hardware, self.chosen = self._measure(cfg, hardware.variation)
        gpus = args.gpus or torch.cuda.device_count() or int(hardware.slots or GPUS)
        self.counted = functools.cache(lambda stages: count(cfg, self.images.megapixels, stages))
        hardware = self._override(hardware)
        memory = 1e9 * args.gpu_memory if args.gpu_memory else hardware.memory_of_one(gpus)
        device = "cpu" if hardware.slots else "cuda"
        self._memory_model = functools.cache(lambda: MemoryModel(cfg, device=device))
        machines = args.machines[0] if args.machines else 1
        self.question = Question(
            cfg,
            frozenset(args.opts[::2]),
            machines,
            gpus,
            memory,
            hardware,
            network(args.network_gbit),
            self.images,
            epoch_model(cfg, args),
            args.target_batch,
        )

        def predict(images: int, stages: tuple[str, ...]) -> Memory:
            model, ranks = self._memory_model(), self.question.ranks
            return model.predict(images, sublinear=stages, world_size=ranks)

        self.search = Search(self.question, predict, self.counted)

    def _measure(self, cfg: CfgNode, variation: float) -> tuple[Hardware, str]:
        from .measure import measure

        args = self.args
        hardware = measure(cfg, self.images, args.measure, variation, args.config)
        path = hardware.write(args.output / "hardware.json")
        return hardware, f"Measured here and written to {path}: plan with it by --hardware {path}."

    def _override(self, hardware: Hardware) -> Hardware:
        args = self.args
        if args.seconds_per_image is not None:
            hardware = replace(
                hardware,
                source="--seconds-per-image",
                seconds_per_image=args.seconds_per_image,
                flops=self.counted(()).step,
            )
        if args.variation is not None:
            hardware = replace(hardware, variation=args.variation)
        return replace(hardware, loader=args.loader) if args.loader is not None else hardware

    def introduction(self) -> list[str]:
        """Returns what is planned, from which numbers, a line each."""
        question, args, hardware = self.question, self.args, self.question.hardware
        counted = self.counted(())
        ratio = counted.step / hardware.flops
        seconds = hardware.seconds_per_image * ratio * hardware.sharing(question.gpus)
        lines = [
            f"{args.config}: {question.cfg.MODEL.META_ARCHITECTURE}, "
            f"{counted.parameters / 1e6:.1f} million parameters are trained, {counted.layers} "
            f"layers of CGBN; {question.images.count:,} images per epoch, of "
            f"{question.images.megapixels:.3g} megapixels.",
            f"{question.machines} x {question.gpus} {hardware.name}, "
            f"{question.memory / 1e9:.4g} GB each; {1e3 * seconds:.3g} ms per image, variation "
            f"{hardware.variation:.2f}.",
        ]
        scaled = ""
        if abs(ratio - 1) > 1e-3:
            scaled = (
                f" Scaled by arithmetic: {counted.step / 1e9:,.0f} GFLOP per image are "
                f"{ratio:.2f} times those that were measured."
            )
        lines.append(f"Seconds from {hardware.source}.{scaled}")
        if hardware.loader is None:
            lines.append("The loader counts as fast enough: give --loader, or --measure it.")
        epochs = question.epochs
        lines.append(
            f"Equal AP takes E(B) = {epochs.least:g} (1 + B / {epochs.critical:g}) epochs "
            f"({epochs.source})."
        )
        notes = self._memory_model().notes
        said = filter(None, [describe_evaluations(question), self.chosen])
        return [*lines, *said, *question.images.notes, *notes]

    def warnings(self, chosen: list[Setting]) -> list[list[str]]:
        """Returns the warnings of each setting."""
        return [find_warnings(self.question, setting) for setting in chosen]

    def lines(self, chosen: list[Setting]) -> list[str]:
        """Returns the launch line of each setting."""
        question = self.question
        return [
            launch_line(
                setting.resolved, self.args.config, question.machines, question.gpus, self.args.opts
            )
            for setting in chosen
        ]

    def to_json(self, chosen: list[Setting], found: Found) -> dict[str, Any]:
        """Returns everything that is printed, as data."""
        rows = [
            setting.as_dict() | {"warnings": warnings, "launch": line}
            for setting, warnings, line in zip(
                chosen, self.warnings(chosen), self.lines(chosen), strict=True
            )
        ]
        return {"introduction": self.introduction(), "settings": rows, "out": found.out}


def check(cfg: CfgNode) -> None:
    """Checks the config's values as a training does, apart from what its machines must have."""
    refuse_batch_warmup(cfg)
    cfg, _ = without_gpus(cfg, gpus=0)
    cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR, cfg.MEGDET.TRACKERS = "", ".", ()
    cfg.SOLVER.AMP.ENABLED, cfg.MODEL.COMPILE = False, False  # also where MODEL.DEVICE is "cpu"
    check_keys(cfg)


def check_flags(args: argparse.Namespace) -> None:
    """Checks numbers of the command line.

    Raises:
        ValueError: names the flag, its value and the fix.
    """
    if args.machines and len(args.machines) > 1:
        raise ValueError(
            f"--machines {','.join(map(str, args.machines))}: a config is planned for one number "
            "of machines; --report draws the others"
        )
    numbers = {
        "machines": args.machines and args.machines[0],
        **{name: getattr(args, name) for name in (
            "gpus", "gpu_memory", "target_batch", "images", "seconds_per_image", "network_gbit",
            "loader", "rows", "measure",
        )},
    }  # fmt: skip
    for name, value in numbers.items():
        if value is not None and not value > 0:
            raise ValueError(f"--{name.replace('_', '-')} is {value:g}; give a number above 0")
    if args.variation is not None and args.variation < 0:
        raise ValueError(f"--variation is {args.variation:g}; give 0 or more")


def epoch_model(cfg: CfgNode, args: argparse.Namespace) -> EpochModel:
    """Returns E(B): of the flags, or the preset that is nearest to the model."""
    dense = cfg.MODEL.META_ARCHITECTURE == "RetinaNet"
    preset = PRESETS[args.epochs_like or ("retinanet" if dense else "maskrcnn")]
    least = preset.least if args.least_epochs is None else args.least_epochs
    critical = preset.critical if args.critical_batch is None else args.critical_batch
    own = args.least_epochs is not None or args.critical_batch is not None
    return EpochModel(least, critical, "your numbers" if own else preset.source)


def choose(settings: list[Setting], rows: int) -> list[Setting]:
    """Returns the first rows to show: the best of each mini-batch, or all where there is one."""
    best: dict[int, Setting] = {}
    for setting in settings:
        best.setdefault(setting.resolved.batch, setting)
    return (settings if len(best) == 1 else list(best.values()))[:rows]


def describe_need(question: Question, found: Found) -> str:
    """Returns why nothing fits, the smallest need, and what to turn."""
    reasons = "\n".join(found.out)
    if not found.needs or min(found.needs.values()) <= question.memory:
        return f"no setting is possible:\n{reasons}"
    (b, stages), least = min(found.needs.items(), key=lambda item: item[1])
    amp = "" if question.cfg.SOLVER.AMP.ENABLED else "set SOLVER.AMP.ENABLED True, "
    return (
        f"nothing fits in {question.memory / 1e9:g} GB per GPU. The smallest need is "
        f"{least / 1e9:.1f} GB: {b} image per GPU with sublinear memory in "
        f"{', '.join(stages) or 'no stage'}. To fit, {amp}lower INPUT.MIN_SIZE_TRAIN and "
        "MAX_SIZE_TRAIN, raise MODEL.BACKBONE.FREEZE_AT, take a smaller backbone, or give a GPU "
        f"with more memory by --gpu-memory.\n{reasons}"
    )
