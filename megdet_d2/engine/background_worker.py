"""The process that evaluates snapshots beside a training, and its handle in the training."""

import contextlib
import functools
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils.logger import setup_logger
from detectron2.utils.serialize import PicklableWrapper
from torch.nn.modules.module import register_module_forward_hook

from .builders import Builders
from .ema import build_average, load_average
from .precision import set_float32_precision

LOG = "log.txt"
# Limits without a layer, over limits without any work: the computation of AP runs no layer.
PATIENCE = 10
_NICE = 5
_STARTING = "MEGDET_D2_BACKGROUND"  # set in the process until it evaluates


class WorkerError(Exception):
    """An evaluation has failed; the message says how."""


class EvaluationProcess:
    """A process that evaluates one snapshot at a time, by the class methods of a trainer.

    It has a low priority, ignores SIGINT and SIGTERM, and ends with this process.

    Args:
        kind: the trainer's class, which the process imports.
        cfg: its config. The process prints to log.txt in its OUTPUT_DIR.
        timeout: seconds without the forward of any module after which it has hung, unless it uses
            a processor, as to compute AP; then ``PATIENCE`` times as many.
    """

    def __init__(self, kind: type[Builders], cfg: CfgNode, timeout: float):
        self._timeout = timeout
        context = multiprocessing.get_context("spawn")
        # When a layer ran last, and when the process used a processor last.
        self._alive_at = context.Array("d", [time.time()] * 2, lock=False)
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_work,
            args=(kind, cfg, PicklableWrapper(_data_sets(cfg)), theirs, self._alive_at),
            name="evaluation",
        )
        with _starting():
            self._process.start()
        theirs.close()  # so that the end of the process is noticed

    def send(self, path: str) -> None:
        """Lets the process evaluate a snapshot. One at a time."""
        self._alive_at[:] = [time.time()] * 2
        with contextlib.suppress(OSError):  # it has ended, as ``receive`` will say
            self._connection.send(path)

    def receive(self, wait: float = 0) -> dict[str, float] | None:
        """Returns the results of the snapshot, or None if there are none within ``wait`` seconds.

        Raises:
            WorkerError: the evaluation has failed or hung, or the process has ended.
        """
        if not self._connection.poll(wait):
            layer, work = (time.time() - at for at in self._alive_at)
            if min(layer, work) > self._timeout or layer > PATIENCE * self._timeout:
                raise WorkerError(
                    f"no layer ran for {layer:.0f} s, and no processor was used for {work:.0f} s "
                    f"(MEGDET.TIMEOUT, or {PATIENCE} times that while a processor is used)"
                )
            return None
        try:
            results, error = self._connection.recv()
        except (EOFError, OSError):
            self._process.join(10)
            raise WorkerError(
                f"its process ended with status {self._process.exitcode}; a negative one is the "
                "signal that ended it, and -9 may mean that memory ran out. A script that is not "
                'a module has to train under  if __name__ == "__main__":'
            ) from None
        if error:
            raise WorkerError(error)
        return results

    def end(self) -> None:
        """Ends the process at once."""
        self._process.kill()
        self._process.join()
        self._connection.close()


def check_importable(kind: type[Builders], cfg: CfgNode) -> None:
    """Checks that another process can get a trainer's class and the data sets.

    Raises:
        ValueError: it cannot, or no process can be started. The message says why, and the fix.
    """
    if multiprocessing.current_process().daemon:
        raise ValueError(
            "TEST.BACKGROUND is True, but this is a daemonic process of multiprocessing, which may "
            "not start another; start it with daemon=False, or set TEST.BACKGROUND False"
        )
    try:
        pickle.dumps(PicklableWrapper(_data_sets(cfg)))
    except Exception as error:  # of the user's objects
        raise ValueError(
            "TEST.BACKGROUND is True, but the functions and metadata of DATASETS.TRAIN and TEST "
            f"cannot be sent to another process ({error}); register them by functions that can, or "
            "set TEST.BACKGROUND False"
        ) from error
    main = sys.modules["__main__"]
    by_name = kind.__module__ != "__main__" or hasattr(main, "__file__")
    try:
        if by_name and pickle.loads(pickle.dumps(kind)) is kind:
            return
    except (pickle.PicklingError, AttributeError, ImportError):
        pass
    raise ValueError(
        f"TEST.BACKGROUND is True, but another process cannot import {kind.__module__}."
        f"{kind.__qualname__}; define the class at the top level of a .py file, or set "
        "TEST.BACKGROUND False"
    )


def refuse_in_worker() -> None:
    """Refuses to train in a process that is about to evaluate.

    Raises:
        RuntimeError: the user's script trains when it is imported.
    """
    if _STARTING in os.environ:
        raise RuntimeError(
            "TEST.BACKGROUND starts a process that imports this script, and the script trains "
            'when it is imported; move the training under  if __name__ == "__main__":'
        )


@contextlib.contextmanager
def _starting() -> Iterator[None]:
    os.environ[_STARTING] = "1"
    try:
        yield
    finally:
        del os.environ[_STARTING]


def _data_sets(cfg: CfgNode) -> dict[str, Any]:
    """Returns functions and metadata of data sets that the user's ``main`` may have registered."""
    names = {*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN} & set(DatasetCatalog)
    return {name: (DatasetCatalog[name], MetadataCatalog.get(name).as_dict()) for name in names}


def _work(
    kind: type[Builders], cfg: CfgNode, data_sets: Any, connection: Connection, alive_at: Any
) -> None:
    os.environ.pop(_STARTING, None)
    for number in (signal.SIGINT, signal.SIGTERM):  # a scheduler sends them to all processes
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    threading.Thread(target=_note_work, args=(alive_at,), daemon=True).start()
    os.nice(_NICE)
    torch.set_num_threads(cfg.TEST.BACKGROUND_THREADS)
    _print_to(os.path.join(cfg.OUTPUT_DIR, LOG))
    evaluate = None
    while True:
        try:
            path = connection.recv()
        except EOFError:
            return
        try:
            if evaluate is None:
                evaluate = _prepare(kind, cfg, data_sets, alive_at)
            answer = evaluate(path), ""
        except Exception as error:  # of the user's code
            traceback.print_exc()
            answer = None, "".join(traceback.format_exception(error))
        connection.send(answer)


def _prepare(kind: type[Builders], cfg: CfgNode, data_sets: dict[str, Any], alive_at: Any) -> Any:
    def live(*_: Any) -> None:
        alive_at[0] = time.time()

    register_module_forward_hook(live)
    for name, (load, metadata) in data_sets.items():
        for catalog in (DatasetCatalog, MetadataCatalog):
            catalog.pop(name, None)  # an import may have registered another
        DatasetCatalog.register(name, load)
        MetadataCatalog.get(name).set(**metadata)
    if cfg.MODEL.DEVICE != "cpu":
        torch.cuda.set_device(cfg.MODEL.DEVICE)
    set_float32_precision(cfg)
    model = kind.build_model(cfg)
    average = build_average(cfg, model)
    return functools.partial(_evaluate, kind, cfg, model, average)


def _evaluate(kind: type[Builders], cfg: CfgNode, model: Any, average: Any, path: str) -> Any:
    file = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    model.load_state_dict(file["model"])
    results = dict(kind.test(cfg, model) or {})
    average = load_average(average, file)
    if average is not None:
        results.update(kind.test_ema(cfg, average.model))
    return {name: float(value) for name, value in flatten_results_dict(results).items()}


def _note_work(alive_at: Any) -> None:
    """Records when this process uses a processor, which it does in AP's computation too."""
    used = 0.0  # so that the imports before this thread count
    while True:
        if time.process_time() - used > 0.01:  # of a second; more than the work of this thread
            alive_at[1] = time.time()
        used = time.process_time()
        time.sleep(1)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


def _print_to(path: str) -> None:
    with open(path, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    for name in ("detectron2", "fvcore", "megdet_d2"):
        setup_logger(name=name, color=False)
