"""From a config to a finished training."""

from .launch import launch
from .prepare import prepare_config
from .trainer import Trainer

__all__ = ["Trainer", "launch", "prepare_config"]
