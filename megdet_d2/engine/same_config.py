"""A comparison of config and code between all processes, before training starts."""

import functools
import hashlib
from pathlib import Path
from typing import Any

import detectron2
import torch
from detectron2.config import CfgNode
from detectron2.utils import comm

from megdet_d2._moved import renamed

_PACKAGES = {
    "megdet_d2": Path(__file__).parent.parent,
    "detectron2": Path(detectron2.__file__).parent,
}


def check_same_config(cfg: CfgNode, **flags: Any) -> None:
    """Compares config, flags and code of all processes. Every process has to call it.

    Args:
        cfg: a resolved config, so that values which follow from the data are compared too.
        flags: other values that have to be equal, by name.

    Raises:
        ValueError: in every process, with the keys that differ and their values by rank.
    """
    facts = _flatten(cfg) | {key: repr(value) for key, value in flags.items()} | _code()
    digest = hashlib.sha256(repr(sorted(facts.items())).encode()).hexdigest()
    if len(set(comm.all_gather(digest))) == 1:
        return
    everyone = comm.all_gather(facts)
    differ = []
    for key in sorted({key for facts in everyone for key in facts}):
        ranks: dict[str, list[int]] = {}
        for rank, facts in enumerate(everyone):
            ranks.setdefault(facts.get(key, "not there"), []).append(rank)
        if len(ranks) > 1:
            values = "; ".join(f"{value} on {_name(which)}" for value, which in ranks.items())
            differ.append(f"{key} is {values}")
    raise ValueError(
        f"The processes differ in what they run: {'. '.join(differ[:8])}. Start every machine with "
        "the same command, code and data"
    )


def _name(ranks: list[int]) -> str:
    listed = ", ".join(map(str, ranks[:8]))
    return f"rank{'s' if len(ranks) > 1 else ''} {listed}{', ...' if len(ranks) > 8 else ''}"


def _flatten(cfg: CfgNode, prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = repr(value)
    return flat


@functools.cache
def _code() -> dict[str, str]:
    """Returns versions and digests of the sources, since a checkout keeps its version."""
    digests = {}
    for name, folder in _PACKAGES.items():
        digest = hashlib.sha256()
        for path in sorted(folder.rglob("*.py")):
            digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
        digests[f"the code of {name}"] = digest.hexdigest()[:12]
    return {"the version of torch": torch.__version__} | digests


__getattr__ = renamed(__name__, check_agreement="check_same_config")
