"""The parts of a training: from a config to a finished run."""

from megdet_d2 import _moved

from .check_config import prepare_config
from .command import evaluate, read_config, setup
from .launch import launch
from .trainer import Trainer

__all__ = ["Trainer", "evaluate", "launch", "prepare_config", "read_config", "setup"]

__getattr__ = _moved.moved(__name__)
