"""From a config to a finished training."""

from .check_config import prepare_config
from .launch import launch
from .trainer import Trainer

__all__ = ["Trainer", "launch", "prepare_config"]
