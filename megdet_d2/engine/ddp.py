"""DistributedDataParallel on CPUs, and to the last bit."""

import contextlib
import functools

import detectron2.engine.defaults as d2_defaults
from detectron2.config import CfgNode
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from megdet_d2._moved import renamed


def finalize_ddp_buckets(model: nn.Module) -> None:
    """Makes DDP put gradients into buckets now as it will in every step.

    It would do so after its first step, and what three or more processes sum depends, in the last
    bit, on the place in the bucket: a resumed run's first step would differ. Not on GPUs, where the
    order of this layout would cost the overlap of communication with backward.
    """
    if isinstance(model, DistributedDataParallel):
        model.reducer._push_all_rebuilt_params()
        model.reducer._rebuild_buckets()


@contextlib.contextmanager
def ddp_without_device_ids(cfg: CfgNode):
    """On CPU, DDP refuses the ``device_ids`` that ``DefaultTrainer``'s constructor insists on.

    The plugin's second patch of Detectron2, for the length of that constructor only.
    """
    if cfg.MODEL.DEVICE != "cpu":
        yield
        return
    stock = d2_defaults.create_ddp_model
    d2_defaults.create_ddp_model = functools.partial(stock, device_ids=None)
    try:
        yield
    finally:
        d2_defaults.create_ddp_model = stock


__getattr__ = renamed(__name__, settle_buckets="finalize_ddp_buckets")
