"""Results of an evaluation that arrive after their iteration, written at that iteration."""

from collections.abc import Iterable

from detectron2.engine import HookBase, hooks
from detectron2.utils.events import CommonMetricPrinter, EventStorage, EventWriter

from .best import BestCheckpointer
from .trackers import TrackRun


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
                _write(writer)


def _write(writer: EventWriter) -> None:
    if isinstance(writer, CommonMetricPrinter):  # prints losses
        return
    last = getattr(writer, "_last_write", None)
    if last is None:
        writer.write()
        return
    writer._last_write = -1  # or it would leave out an iteration that it has passed
    try:
        writer.write()
    finally:
        writer._last_write = last
