"""The checks of the switches of today's recipes, before a training or an evaluation."""

from detectron2.config import CfgNode

from megdet_d2.optim.build import check_optimizer

from .auto_micro_batch import check_auto_micro_batch
from .background import check_background
from .compiled import check_compile
from .ema import check_decay
from .precision import check_precision
from .sgd import check_sgd
from .trackers import check_trackers


def check_switches(cfg: CfgNode, eval_only: bool = False) -> None:
    """Checks the keys of all switches. MODEL.DEVICE has to be the one that is used.

    Args:
        cfg: a config.
        eval_only: skip the keys that only a training uses.

    Raises:
        ValueError: a value is not valid, or cannot work here. The message names the key and the
            fix.
    """
    check_decay(cfg)
    check_compile(cfg)
    check_precision(cfg, eval_only)
    if not eval_only:
        check_auto_micro_batch(cfg)
        check_sgd(cfg)
        check_optimizer(cfg)
        check_trackers(cfg)
        check_background(cfg)
