"""From a config to a finished training."""

from .launch import launch
from .trainer import Trainer, prepare_config

__all__ = ["Trainer", "launch", "prepare_config"]
