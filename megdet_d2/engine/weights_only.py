"""Loads checkpoints without running code that they may hold."""

import contextlib
import os
import pickle
from collections.abc import Iterator
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer

_DETECTRON2 = "https://dl.fbaipublicfiles.com/detectron2/"
_FORCE, _FORCE_NOT = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


class WeightsOnlyCheckpointer(DetectionCheckpointer):
    """``DetectionCheckpointer`` that reads only tensors and plain values from ``.pth`` files.

    torch does so by default from 2.6 on. Older versions unpickle the file, which can run any code
    that its author put there. ``.pkl`` files are pickles in every version: load only trusted ones.

    A user who trusts a file with other objects sets ``TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1``.
    """

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Loads a file, as Detectron2 does.

        Raises:
            OSError: it could not be downloaded. The message says how to go on without a network.
        """
        if path and "://" in path:
            address = path.split("?")[0]  # Detectron2 takes options after it
            try:
                self.path_manager.get_local_path(address)
            except Exception as error:  # urllib, iopath and others raise many kinds
                page = address.replace("detectron2://", _DETECTRON2)
                raise OSError(
                    f"MODEL.WEIGHTS is {path!r}, which could not be downloaded ({error}). Download "
                    f"{page} on a machine with a network, and set MODEL.WEIGHTS to the path of the "
                    'file; or set it to "" and MODEL.BACKBONE.FREEZE_AT to 0 to start from scratch'
                ) from error
        return super().load(path, *args, **kwargs)

    def _load_file(self, filename: str) -> dict[str, Any]:
        with _weights_only():
            try:
                return super()._load_file(filename)
            except pickle.UnpicklingError as error:
                if filename.endswith(".pkl"):
                    raise
                raise pickle.UnpicklingError(
                    f"{filename} holds more than tensors and plain values, and loading it could "
                    f"run code. If you trust it, set {_FORCE_NOT}=1"
                ) from error


@contextlib.contextmanager
def _weights_only() -> Iterator[None]:
    # Detectron2 and fvcore call torch.load without the argument, for ".pyth" too.
    before = os.environ.get(_FORCE)
    if os.environ.get(_FORCE_NOT, "0").lower() in {"0", "", "false", "n", "no"}:
        os.environ[_FORCE] = "1"
    try:
        yield
    finally:
        os.environ.pop(_FORCE, None)
        if before is not None:
            os.environ[_FORCE] = before
