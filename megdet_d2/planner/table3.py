"""Tests the model on the paper's Table 3: fits its rows up to 16 GPUs, predicts the other hours.

    hours = iterations · t / 3600,   t = c b (1 + σ [sublinear]) + waiting + γ g + exposed gradients

Fitted are three numbers, by least squares of the relative errors, on the CGBN rows up to 16 GPUs:

    c  seconds per image,
    σ  the extra part for sublinear memory, which the paper uses from BN size 32 on,
    γ  seconds per update for each of the g GPUs of a machine: its processes share CPU and bus.

v, for the waiting, is not fitted here. It comes from MLPerf's systems of one machine. The paper
names no network; with 10 to 100 Gb/s per machine backward hides most of the gradients.
"""

import functools
from dataclasses import dataclass

import numpy as np

from megdet_d2.config import load_config
from megdet_d2.model_zoo import CONFIGS
from megdet_d2.schedule.build import scale_config

from .back_test import BackTest, Row
from .mlperf import variation
from .step_time import Work, exposed_gradients, step_time
from .stragglers import waiting
from .topology import PCIE, Topology, network

MOST_GPUS_FITTED = 16
GPUS_PER_MACHINE = 8
GRADIENT_BYTES = 4 * 41.5e6
"""Faster R-CNN R50-FPN has 41.5 million parameters, in single precision."""
NETWORK = network(100)
"""An assumption: the paper names none."""


@dataclass(frozen=True)
class PaperRow:
    """A CGBN row of Table 3.

    Attributes:
        name: file name of its config.
        gpus, images: GPUs, and images per GPU.
        sublinear: it uses sublinear memory.
        iterations: length of the training.
        hours: as published.
    """

    name: str
    gpus: int
    images: float
    sublinear: bool
    iterations: int
    hours: float

    @property
    def topology(self) -> Topology:
        """The topology: machines of up to 8 GPUs on a PCIe bus."""
        gpus = min(self.gpus, GPUS_PER_MACHINE)
        return Topology(self.gpus // gpus, gpus, PCIE, NETWORK)


@dataclass(frozen=True)
class Constants:
    """The fitted numbers, see the module.

    Attributes:
        seconds_per_image: c.
        sublinear: σ.
        per_gpu: γ, seconds.
    """

    seconds_per_image: float
    sublinear: float
    per_gpu: float


@functools.cache
def paper_rows() -> tuple[PaperRow, ...]:
    """Returns the 13 normal and 6 long CGBN rows; 16-base has frozen norms and is left out."""
    rows = []
    for path in sorted((CONFIGS / "ablations" / "table3").glob("*.yaml")):
        cfg = load_config(path)
        paper = cfg.MEGDET.ABLATION
        if "base" in path.stem:
            continue
        scale_config(cfg, world_size=paper.GPUS)
        row = PaperRow(
            path.stem,
            paper.GPUS,
            cfg.SOLVER.IMS_PER_BATCH / paper.GPUS,
            cfg.MODEL.SUBLINEAR.ENABLED,
            cfg.SOLVER.MAX_ITER,
            paper.PAPER_HOURS,
        )
        rows.append(row)
    return tuple(rows)


def fit(rows: tuple[PaperRow, ...], variation: float) -> Constants:
    """Returns the constants with the least squares of the relative errors of ``rows``."""
    terms, targets = [], []
    for row in rows:
        images = row.images + waiting(row.images, row.gpus, variation)
        seconds = row.hours * 3600 / row.iterations
        last_bucket = exposed_gradients(GRADIENT_BYTES, row.topology, np.inf)
        columns = (images, images * row.sublinear, row.topology.gpus)
        terms.append([column / seconds for column in columns])
        targets.append(1 - last_bucket / seconds)
    c, extra, per_gpu = np.linalg.lstsq(np.array(terms), np.array(targets), rcond=None)[0]
    return Constants(float(c), float(extra / c), float(per_gpu))


def predict(row: PaperRow, constants: Constants, variation: float) -> float:
    """Returns the hours of a row."""
    work = Work(
        constants.seconds_per_image * (1 + constants.sublinear * row.sublinear),
        row.images,
        variation=variation,
        gradient_bytes=GRADIENT_BYTES,
        host=constants.per_gpu * row.topology.gpus,
    )
    return row.iterations * step_time(work, row.topology).total / 3600


def back_test() -> BackTest:
    """Returns the hours of all CGBN rows, published and predicted."""
    v, _, _ = variation()
    constants = fit(tuple(r for r in paper_rows() if r.gpus <= MOST_GPUS_FITTED), v)
    rows = tuple(
        Row(
            f"{row.name}, {row.gpus} GPUs",
            row.hours,
            predict(row, constants, v),
            row.gpus <= MOST_GPUS_FITTED,
        )
        for row in paper_rows()
    )
    numbers = {
        "c": f"{constants.seconds_per_image:.3f} s per image",
        "σ": f"{constants.sublinear:.0%}",
        "γ": f"{constants.per_gpu:.3f} s per GPU of a machine",
        "v": f"{v:.2f}, from MLPerf",
    }
    notes = (
        "The paper's hours are not monotone. On the same 8 GPUs BN size 64 takes 40.9 h and BN "
        "size 32 takes 45.5 h, and with 16 images BN size 2 takes longer than BN size 16.",
        "Nor do they follow the epochs: 256 images on 128 GPUs take 0.37 h per epoch in 11 epochs "
        "and 0.30 h in 18. No model of this form gives both, and the rows are left in.",
    )
    return BackTest("The paper's Table 3, hours", "h", rows, numbers, notes)
