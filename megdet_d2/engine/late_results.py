"""Results of an evaluation that arrive after their iteration, written at that iteration."""

import logging
from collections.abc import Iterable

from detectron2.engine import HookBase, hooks
from detectron2.utils.events import CommonMetricPrinter, EventStorage, EventWriter

from .best import BestCheckpointer
from .trackers import TrackRun

logger = logging.getLogger(__name__)


def deliver(
    receivers: Iterable[HookBase],
    results: dict[str, float],
    iteration: int,
    images_seen: int,
    path: str,
) -> None:
    """Gives late results to the hooks that Detectron2 lets read them from the storage.

    Args:
        receivers: hooks, of which the best checkpoint, the trackers and the writers get results.
        results: by their names, such as "bbox/AP".
        iteration: of the model that was evaluated.
        images_seen: images of all updates until then.
        path: the checkpoint of that model.
    """
    receivers = list(receivers)
    for hook in receivers:
        if isinstance(hook, BestCheckpointer):  # before the row, without which it comes again
            hook.check(results, iteration, path)
        elif isinstance(hook, TrackRun):
            hook.send(results, iteration)
    with EventStorage(iteration) as storage:
        storage.put_scalars(**results, images_seen=images_seen, smoothing_hint=False)
        for hook in receivers:
            for writer in hook._writers if isinstance(hook, hooks.PeriodicWriter) else ():
                if not isinstance(writer, CommonMetricPrinter):  # it prints losses
                    _write(writer)


def _write(writer: EventWriter) -> None:
    last = getattr(writer, "_last_write", None)
    try:
        if last is not None:
            writer._last_write = -1  # or it would leave out an iteration that it has passed
        writer.write()
    except Exception as error:  # of a project's writer, which may need other metrics
        logger.warning(f"{type(writer).__name__} does not write late results: {error!r}")
    finally:
        if last is not None:
            writer._last_write = last
