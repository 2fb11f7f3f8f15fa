"""Makes a config of machines with GPUs one that a machine without them can check."""

import re

from detectron2.config import CfgNode


def without_gpus(cfg: CfgNode, gpus: int) -> tuple[CfgNode, tuple[str, ...]]:
    """Returns a copy that can be checked here, and the keys that the check leaves out.

    All other values stay, so that wrong ones are refused.

    Args:
        cfg: a config of another machine.
        gpus: of this machine; 0 checks as on a CPU.
    """
    cfg = cfg.clone()
    cfg.defrost()
    left = []
    background = re.fullmatch(r"cuda:(\d+)", cfg.TEST.BACKGROUND_DEVICE)
    if background and int(background[1]) >= gpus:
        cfg.TEST.BACKGROUND_DEVICE = "cpu"
        left += ["TEST.BACKGROUND_DEVICE"] if cfg.TEST.BACKGROUND else []
    if gpus or not cfg.MODEL.DEVICE.startswith("cuda"):
        return cfg, tuple(left)
    left.insert(0, "MODEL.DEVICE")
    cfg.MODEL.DEVICE = "cpu"
    for node, section, key, value, here in (
        (cfg.SOLVER.AMP, "SOLVER.AMP", "ENABLED", True, False),
        (cfg.SOLVER, "SOLVER", "SGD_IMPLEMENTATION", "fused", "foreach"),
        (cfg.MODEL, "MODEL", "COMPILE", True, False),
    ):
        if node[key] == value:
            left.append(f"{section}.{key}")
            node[key] = here
    keys = cfg.MEGDET
    if keys.AUTO_MICRO_BATCH:
        left.append("MEGDET.AUTO_MICRO_BATCH")
        # On a CPU the key needs a limit. The check does not use it.
        keys.MEMORY_LIMIT_MB = keys.MEMORY_LIMIT_MB or 1
    return cfg, tuple(left)
