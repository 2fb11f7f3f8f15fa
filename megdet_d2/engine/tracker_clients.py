"""The writers of metrics, images and checkpoints to the clients of Weights & Biases and MLflow."""

import os
import re
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from detectron2.config import CfgNode
from detectron2.utils.events import EventWriter, get_event_storage


class Tracker(EventWriter):
    """The base of writers that send metrics and images to one run of a tracker.

    Only the methods with ``raise NotImplementedError`` know the tracker.
    """

    name: str

    def __init__(self) -> None:
        self._last = -1  # the last iteration whose metrics were sent
        self._last_image = -1

    def start(self, cfg: CfgNode, run: str, iteration: int) -> str:
        """Starts a run with the config, or continues one.

        Args:
            cfg: the config of the training.
            run: the id of the run to continue; "" for a new one.
            iteration: the last one that is completed; -1 for none.

        Returns:
            the run's id.
        """
        self._last = self._last_image = iteration
        return self.open_run(cfg, run)

    def write(self) -> None:
        """Sends the metrics and images since the last call, smoothed as Detectron2 writes them."""
        storage = get_event_storage()
        rows: dict[int, dict[str, float]] = defaultdict(dict)
        for name, (value, iteration) in storage.latest_with_smoothing_hint().items():
            if iteration > self._last:
                rows[iteration][name] = float(value)
        images = [(n, im, i) for n, im, i in storage._vis_data if i > self._last_image]
        # An error must not send the same again.
        self._last = max(rows, default=self._last)
        self._last_image = max((i for _, _, i in images), default=self._last_image)
        for iteration in sorted(rows):
            self.log_metrics(rows[iteration], iteration)
        for name, image, iteration in images:
            self.log_image(name, _pixels(image), iteration)

    def open_run(self, cfg: CfgNode, run: str) -> str:
        """Opens a run; see ``start``."""
        raise NotImplementedError

    def log_metrics(self, metrics: dict[str, float], iteration: int) -> None:
        """Sends the metrics of an iteration."""
        raise NotImplementedError

    def log_image(self, name: str, image: np.ndarray, iteration: int) -> None:
        """Sends an image of uint8 (H, W, 3) in RGB."""
        raise NotImplementedError

    def log_file(self, folder: str, name: str) -> None:
        """Sends the checkpoint ``name``, which may have a folder, of the folder OUTPUT_DIR."""
        raise NotImplementedError


class WandbTracker(Tracker):
    """Writes to Weights & Biases, which reads WANDB_PROJECT, WANDB_MODE and its other variables."""

    name = "wandb"

    def open_run(self, cfg: CfgNode, run: str) -> str:
        """Opens a run with its files in OUTPUT_DIR/wandb."""
        import wandb

        self._run = wandb.init(
            dir=cfg.OUTPUT_DIR,
            name=os.path.basename(os.path.abspath(cfg.OUTPUT_DIR)),
            config=yaml.safe_load(cfg.dump()),
            id=run or None,
            resume="allow" if run else None,
        )
        # Iterations that a resume repeats are then not out of order.
        self._run.define_metric("iteration")
        self._run.define_metric("*", step_metric="iteration")
        return self._run.id

    def log_metrics(self, metrics: dict[str, float], iteration: int) -> None:
        """Sends the metrics of an iteration."""
        self._run.log({**metrics, "iteration": iteration})

    def log_image(self, name: str, image: np.ndarray, iteration: int) -> None:
        """Sends an image of uint8 (H, W, 3) in RGB."""
        import wandb

        self._run.log({name: wandb.Image(image), "iteration": iteration})

    def log_file(self, folder: str, name: str) -> None:
        """Sends a checkpoint as an artifact of type "model"."""
        import wandb

        artifact = wandb.Artifact(f"{_flat(name)}-{self._run.id}", type="model")
        artifact.add_file(os.path.join(folder, name))
        self._run.log_artifact(artifact)

    def close(self) -> None:
        """Ends the run."""
        self._run.finish()


class MlflowTracker(Tracker):
    """Writes to MLflow, which reads MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME.

    Without a tracking URI the runs are files in OUTPUT_DIR/mlruns.
    """

    name = "mlflow"

    def open_run(self, cfg: CfgNode, run: str) -> str:
        """Opens a run. Its parameters are the config's; config.yaml is a file of it."""
        import mlflow

        if not mlflow.is_tracking_uri_set():
            # MLflow asks for this where files are meant.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            uri = Path(cfg.OUTPUT_DIR, "mlruns").absolute().as_uri()
        else:
            uri = mlflow.get_tracking_uri()
        self._client = mlflow.MlflowClient(tracking_uri=uri)
        if run:
            self._client.update_run(run, status="RUNNING")
        else:
            run = self._new_run(cfg)
        self._id = run
        self._client.log_text(run, cfg.dump(), "config.yaml")
        return run

    def _new_run(self, cfg: CfgNode) -> str:
        from mlflow.entities import Param

        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "Default")
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        run_name = os.path.basename(os.path.abspath(cfg.OUTPUT_DIR))
        run = self._client.create_run(experiment, run_name=run_name).info.run_id
        params = [Param(key, str(value)[:500]) for key, value in _flatten(cfg)]
        for start in range(0, len(params), 100):  # the most of a request
            self._client.log_batch(run, params=params[start : start + 100])
        return run

    def log_metrics(self, metrics: dict[str, float], iteration: int) -> None:
        """Sends the metrics of an iteration."""
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        values = [Metric(_allowed(name), value, now, iteration) for name, value in metrics.items()]
        for start in range(0, len(values), 1000):  # the most of a request
            self._client.log_batch(self._id, metrics=values[start : start + 1000])

    def log_image(self, name: str, image: np.ndarray, iteration: int) -> None:
        """Sends an image of uint8 (H, W, 3) in RGB."""
        self._client.log_image(self._id, image, f"images/{_flat(name)}_{iteration:07d}.png")

    def log_file(self, folder: str, name: str) -> None:
        """Sends a checkpoint as an artifact in "model"."""
        place = os.path.dirname(os.path.join("model", name))
        self._client.log_artifact(self._id, os.path.join(folder, name), place)

    def close(self) -> None:
        """Ends the run."""
        self._client.set_terminated(self._id)


# By their names in MEGDET.TRACKERS, which are those of their packages too.
TRACKERS: dict[str, type[Tracker]] = {kind.name: kind for kind in (WandbTracker, MlflowTracker)}


def _pixels(image: Any) -> np.ndarray:
    """Returns an image of a storage, (3, H, W) in [0, 1] or uint8, as uint8 (H, W, 3)."""
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8:
        pixels = (255 * pixels).clip(0, 255).astype(np.uint8)
    return np.ascontiguousarray(pixels.transpose(1, 2, 0))


def _flatten(node: CfgNode, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, CfgNode):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _allowed(name: str) -> str:
    return re.sub(r"[^/\w.\- :]", "_", name)  # by MLflow


def _flat(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name)
