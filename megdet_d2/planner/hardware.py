"""The device that is planned for: seconds of an image, memory and links.

A preset is a published measurement of one model, Mask R-CNN R50-FPN. Other models take as much
longer as they have more arithmetic. A file is a measurement of ``megdet plan --measure``.
"""

import functools
import json
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from . import mlperf
from .stragglers import waiting
from .topology import NVLINK, PCIE, Link

FLOPS_AT_800, FLOPS_AT_640_TO_800 = 1.2357e12, 1.0569e12
"""Floating-point operations of a step of Mask R-CNN R50-FPN with an image of COCO, by its short
side; the stem and res2 are frozen. See flops.py."""
GIGABYTES = {"A30": 24, "A40": 48, "L40": 48, "L40S": 48}
"""Memory of the accelerators whose name in MLPerf's table does not tell it."""
DEFAULT = "A100-SXM-80GB"
ZOO = "V100-SXM-16GB"
"""The GPU of Detectron2's model zoo, whose seconds are those of Detectron2 itself in float32."""
ZOO_SECONDS, ZOO_GPUS, ZOO_IMAGES = 0.261, 8, 2
"""Seconds of an update of Mask R-CNN R50-FPN there, GPUs, and images per GPU."""
NVLINK_2 = Link(0.6e-6, 4.0e-6, 150e9)
"""NVLink of a V100."""


@dataclass(frozen=True)
class Hardware:
    """A device, and the links between the devices of a machine.

    Attributes:
        name: of the preset or of the device.
        source: a sentence on where the seconds are from.
        seconds_per_image: c of the model that was measured; forward and backward.
        flops: F of that image, see ``flops.py``.
        variation: v, coefficient of variation of the cost of an image.
        memory: bytes of one device, or of a machine whose processes share it.
        inside: the link inside a machine.
        host: h, seconds per update.
        loader: images/s that the loader of one process decodes; None: not known.
        slots: processes that run at once at this speed on the cores of a machine; more of them
            share these. None where each has a GPU.
        config: the config that was measured; "" for a preset.
    """

    name: str
    source: str
    seconds_per_image: float
    flops: float
    variation: float
    memory: float
    inside: Link
    host: float = 0.0
    loader: float | None = None
    slots: float | None = None
    config: str = ""

    def sharing(self, processes: int) -> float:
        """Returns how many times longer the compute takes, since processes share the cores."""
        return 1.0 if self.slots is None else max(1.0, processes / self.slots)

    def memory_of_one(self, processes: int) -> float:
        """Returns the bytes for each of ``processes`` on a machine."""
        return self.memory if self.slots is None else self.memory / processes

    def write(self, path: Path) -> Path:
        """Writes a json file that ``read`` reads, and returns ``path``."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")
        return path


@functools.cache
def presets() -> dict[str, Hardware]:
    """Returns the devices with a published measurement, by name."""
    v = mlperf.variation()[0]
    found = {}
    for name, (seconds, newest) in mlperf.hardware_seconds().items():
        found[name] = Hardware(
            name,
            f"NVIDIA's Mask R-CNN R50-FPN at 800 x 1333 on {name} in MLPerf {newest}, in half "
            "precision with CUDA graphs. Detectron2's own code takes several times as long: "
            "measure yours by --measure, or give --seconds-per-image",
            seconds,
            FLOPS_AT_800,
            v,
            gigabytes(name) * 1e9,
            NVLINK if "SXM" in name else PCIE,
        )
    images = ZOO_IMAGES + waiting(ZOO_IMAGES, ZOO_GPUS, v)
    found[ZOO] = Hardware(
        ZOO,
        f"Detectron2's model zoo: Mask R-CNN R50-FPN takes {ZOO_SECONDS} s per update of "
        f"{ZOO_GPUS * ZOO_IMAGES} images on {ZOO_GPUS} V100, in float32 with frozen norms",
        ZOO_SECONDS / images,
        FLOPS_AT_640_TO_800,
        v,
        16e9,
        NVLINK_2,
    )
    return found


def gigabytes(name: str) -> float:
    """Returns the memory that a name such as A100-SXM-80GB tells.

    Raises:
        ValueError: it does not tell.
    """
    match = re.search(r"(\d+)GB", name)
    if match is None and name not in GIGABYTES:
        raise ValueError(f"{name} does not tell its memory; give --gpu-memory")
    return float(match[1]) if match else GIGABYTES[name]


def find(name: str | None) -> tuple[Hardware, str]:
    """Returns a preset, or the measurement in a file, and a sentence where it was chosen.

    Args:
        name: of a preset, or path of a json file; None for the GPU of this machine.

    Raises:
        FileNotFoundError, ValueError: there is none.
    """
    if name is None:
        here = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
        known = match(here)
        if known:
            return presets()[known], ""
        seen = f"{here} has no preset" if here else "this machine has no GPU"
        return presets()[DEFAULT], f"Planned for {DEFAULT}, as {seen}: choose by --hardware."
    if name.endswith(".json"):
        return read(Path(name)), ""
    if name not in presets():
        raise ValueError(
            f"--hardware {name} is not in MLPerf's table; use one of {', '.join(presets())}, a "
            "json file of --measure, or give --seconds-per-image"
        )
    return presets()[name], ""


def match(device: str) -> str | None:
    """Returns the preset of a device that torch names, such as "NVIDIA A100-SXM4-80GB"."""
    words = set(re.split(r"[ -]", device.upper().replace("SXM4", "SXM").replace("SXM2", "SXM")))
    if "HBM3" in words:  # torch's name of an H100 SXM is "NVIDIA H100 80GB HBM3"
        words.add("SXM")
    fitting = [name for name in presets() if set(name.upper().split("-")) <= words]
    return max(fitting, key=len, default=None)


def read(path: Path) -> Hardware:
    """Returns the measurement of a file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it was not written by ``--measure``; names the key.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--hardware {path}: there is no such file; write it by --measure")
    try:
        data = json.loads(path.read_text())
        data["inside"] = Link(**data["inside"])
        hardware = Hardware(**data)
    except (ValueError, TypeError, KeyError) as error:
        known = ", ".join(field.name for field in fields(Hardware))
        raise ValueError(
            f"--hardware {path} is no file of --measure ({error}); its keys are {known}"
        ) from None
    _check(path, asdict(hardware))
    return hardware


def _check(path: Path, values: dict[str, Any]) -> None:
    for key in ("seconds_per_image", "flops", "memory"):
        if not isinstance(values[key], (int, float)) or not values[key] > 0:
            raise ValueError(f"--hardware {path}: {key} is {values[key]!r}; give a number above 0")
