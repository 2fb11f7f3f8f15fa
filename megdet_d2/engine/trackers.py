"""The experiment trackers, which get config, metrics, images and the final model of a training."""

import contextlib
import importlib.util
import json
import logging
import os
from collections.abc import Iterator

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from .checkpoint import WholeFiles
from .ema import FOLDER
from .hooks import PERIOD, is_due
from .tracker_clients import TRACKERS, Tracker

logger = logging.getLogger(__name__)

RUNS = "trackers.json"


class TrackRun(HookBase):
    """A hook that starts, writes and ends the runs of ``MEGDET.TRACKERS``.

    Rank 0 alone has trackers. All processes have the hook, so that a tracker that cannot start is
    an error in all of them. A tracker that fails later is logged, and the training goes on.

    Register it before Detectron2's writers, which remove images.

    Args:
        cfg: the config of the training. Its OUTPUT_DIR has the ids of the runs in trackers.json,
            and a resumed training continues these runs.
    """

    def __init__(self, cfg: CfgNode):
        self._cfg = cfg
        main = comm.is_main_process()
        self._open: list[Tracker] = []
        self._trackers = [TRACKERS[name]() for name in cfg.MEGDET.TRACKERS] if main else []

    def before_train(self) -> None:
        """Starts or continues the runs.

        Raises:
            RuntimeError: in every process, if one cannot start.
        """
        error = ""
        try:
            self._start()
        except Exception as failed:  # of clients and networks
            error = f"MEGDET.TRACKERS {list(self._cfg.MEGDET.TRACKERS)}: {failed}"
        error = comm.all_gather(error)[0]
        if error:
            raise RuntimeError(f"{error}; correct the tracker's settings, or leave it out")

    def _start(self) -> None:
        path = os.path.join(self._cfg.OUTPUT_DIR, RUNS)
        runs = {}
        if self.trainer.progress.loaded_iteration is not None and PathManager.isfile(path):
            with PathManager.open(path) as file:
                runs = json.load(file)
        for tracker in self._trackers:
            run = tracker.start(self._cfg, runs.get(tracker.name, ""), self.trainer.start_iter - 1)
            runs[tracker.name] = run
            self._open.append(tracker)
            logger.info(f"{tracker.name}: run {run}")
        if self._trackers:
            with WholeFiles(PathManager).open(path, "w") as file:
                json.dump(runs, file)

    def after_step(self) -> None:
        """Sends metrics and images, as often as Detectron2 writes them."""
        if is_due(self.trainer, PERIOD):
            for tracker in self._open:
                with _logging_errors(tracker):
                    tracker.write()

    def send(self, metrics: dict[str, float], iteration: int) -> None:
        """Sends metrics of an earlier iteration."""
        for tracker in self._open:
            with _logging_errors(tracker):
                tracker.log_metrics(metrics, iteration)

    def after_train(self) -> None:
        """Sends the rest and, after a training that is completed, the final models."""
        folder = self._cfg.OUTPUT_DIR
        models = ("model_final.pth", os.path.join(FOLDER, "model_final.pth"))
        for tracker in self._open:
            with _logging_errors(tracker):
                tracker.write()
                for name in models if self.trainer.has_finished else ():
                    if os.path.isfile(os.path.join(folder, name)):
                        tracker.log_file(folder, name)
            with _logging_errors(tracker):
                tracker.close()


def check_trackers(cfg: CfgNode) -> None:
    """Checks ``MEGDET.TRACKERS``, and that their packages are installed.

    Raises:
        ValueError: a name is unknown, or a package is missing.
    """
    for name in cfg.MEGDET.TRACKERS:
        if name not in TRACKERS:
            raise ValueError(
                f"MEGDET.TRACKERS has {name!r}; use some of {', '.join(TRACKERS)}, as in "
                f"MEGDET.TRACKERS \"('{next(iter(TRACKERS))}',)\""
            )
        if importlib.util.find_spec(name) is None:
            raise ValueError(
                f"MEGDET.TRACKERS has {name!r}, but this package is not installed: "
                f'run  pip install -e ".[{name}]"'
            )


@contextlib.contextmanager
def _logging_errors(tracker: Tracker) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of clients and networks
        logger.warning(f"{tracker.name}: not sent, and the training goes on: {error}")
