import logging
import os

# One thread, as in the processes that tests start: numbers are compared to the last bit, and
# threads that spin while other programs have the cores take many times longer.
os.environ["OMP_NUM_THREADS"] = "1"
# Set before torch reads it. Detectron2's launcher chooses NCCL where it sees a GPU, and only
# test_cuda.py needs one.
if "MEGDET_TEST_GPU" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest
import torch

from megdet_d2.engine.rendezvous import reserved_port
from tests.helpers.gloo_pool import GlooPool


@pytest.fixture(autouse=True)
def seeded():
    """Seeds torch, so that no test depends on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def loggers():
    """Takes back what ``default_setup`` has done to the loggers, here and in shared fixtures."""
    loggers = [logging.getLogger(name) for name in ("fvcore", "detectron2", "megdet_d2")]
    for logger in loggers:
        logger.setLevel(logging.NOTSET)
        logger.propagate, logger.handlers = True, []


@pytest.fixture
def port():
    """A free port, for processes that are told of it."""
    with reserved_port() as port:
        yield port


def _pool(world_size: int, ranks_per_machine: int | None = None):
    @pytest.fixture(scope="session")
    def pool():
        pool = GlooPool(world_size, ranks_per_machine)
        yield pool
        pool.close()

    return pool


pool2 = _pool(2)
pool3 = _pool(3)
pool4 = _pool(4)
pool8 = _pool(8)
two_machines = _pool(4, ranks_per_machine=2)
