"""The state of all random numbers of a process, to be put back later."""

import random
from typing import Any

import numpy as np
import torch


class RandomState:
    """Keeps the state that Python's, NumPy's and torch's random numbers have now."""

    def __init__(self) -> None:
        self._states = random.getstate(), np.random.get_state(), torch.get_rng_state()
        self._device: Any = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None

    def restore(self) -> None:
        """Puts the state back."""
        random.setstate(self._states[0])
        np.random.set_state(self._states[1])
        torch.set_rng_state(self._states[2])
        if self._device is not None:
            torch.cuda.set_rng_state(self._device)
