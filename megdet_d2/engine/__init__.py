"""From a config to a finished training."""

from megdet_d2 import _moved

from .check_config import prepare_config
from .launch import launch
from .trainer import Trainer

__all__ = ["Trainer", "launch", "prepare_config"]

__getattr__ = _moved.moved(__name__)
