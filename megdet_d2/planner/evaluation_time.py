"""Computes the seconds by which evaluations lengthen a training: forward of test images, and AP."""

from .question import Question
from .resolved import Resolved

FORWARD = 1 / 3
"""The part of a step's arithmetic that is forward."""
SECONDS_OF_AP = {"pycocotools": 41.0 / 5000, "hotcoco": 0.6 / 5000}
"""Of an image with 100 boxes, on one core: docs/results/evaluation_cpu_2026-11-29.json."""


def evaluation_seconds(question: Question, resolved: Resolved, step: float, update: float) -> float:
    """Returns the seconds of all evaluations for which the training does not go on.

    A test of a model takes N (c_F / P + s). c_F is forward of an image. P ranks share the N images,
    and rank 0 alone computes the AP, in s seconds per image. Each evaluation tests the model, and
    the average of MEGDET.EMA_DECAY. The last one tests both again with TEST.AUG. With
    TEST.BACKGROUND those before the last cost what ``background_seconds`` returns.

    Args:
        question: data, device, and the TEST keys.
        resolved: number and period of the evaluations.
        step: floating-point operations of an image in training.
        update: seconds of an update.
    """
    if not resolved.evaluations:
        return 0.0
    hardware, images, cfg = question.hardware, question.images, question.cfg
    forward = hardware.seconds_per_image * FORWARD * step / hardware.flops
    ap = SECONDS_OF_AP[cfg.TEST.COCO_API]

    def test(megapixels: float, ranks: int, processes: int) -> float:
        seconds = forward * megapixels / images.megapixels * hardware.sharing(processes)
        return images.test * (seconds / ranks + ap)

    models, before = count_models(question), resolved.evaluations - 1
    plain = test(images.test_megapixels, question.ranks, question.gpus)
    seconds = before * models * plain + plain
    if cfg.TEST.BACKGROUND:
        beside = models * test(images.test_megapixels, 1, question.gpus + 1)
        trained = before * resolved.evaluation_period
        seconds = background_seconds(
            before,
            beside if knows_background(question) else 0.0,
            plain,
            resolved.evaluation_period * update,
            (resolved.iterations - trained) * update,
        )
    seconds += (models - 1) * plain  # the last one of the average comes after that waiting
    if cfg.TEST.AUG.ENABLED:
        seconds += models * test(augmented_megapixels(question), question.ranks, question.gpus)
    return seconds


def background_seconds(number: int, each: float, last: float, period: float, rest: float) -> float:
    """Returns the seconds by which evaluations of TEST.BACKGROUND, and the last one, stop training.

    Two checkpoints may wait, the one that is being evaluated among them. So the process gets the
    m-th after max(m T, T + (m - 2) V) seconds, and has its results after max(m T + V, T + m V).
    The last evaluation comes R seconds after the m-th, and then the training waits for results.

    Args:
        number: m, evaluations before the last.
        each: V, seconds of one beside the training.
        last: seconds of the last one, which all processes make.
        period: T, seconds of training between two.
        rest: R.
    """
    if not number:
        return last
    begun = max(number * period, period + (number - 2) * each)
    known = max(number * period + each, period + number * each)
    return max(begun + rest + last, known) - number * period - rest


def count_models(question: Question) -> int:
    """Returns the models that an evaluation tests: also the average of MEGDET.EMA_DECAY."""
    return 2 if question.cfg.MEGDET.EMA_DECAY else 1


def augmented_megapixels(question: Question) -> float:
    """Returns the megapixels of all forwards of a test image with TEST.AUG.

    With masks the backbone takes each version a second time, for the boxes that were merged. That
    counts as a whole forward.
    """
    return question.images.augmented_megapixels * (2 if question.cfg.MODEL.MASK_ON else 1)


def knows_background(question: Question) -> bool:
    """Returns True if TEST.BACKGROUND_DEVICE is of the kind of device that is planned for."""
    is_cpu = question.cfg.TEST.BACKGROUND_DEVICE == "cpu"
    return is_cpu == (question.hardware.slots is not None)


def describe_evaluations(question: Question) -> str:
    """Returns a sentence on what the evaluations do beside one test each; "" for nothing."""
    test, parts = question.cfg.TEST, []
    if not question.images.test:
        return ""
    if count_models(question) > 1:
        parts.append("each tests two models (MEGDET.EMA_DECAY)")
    if test.AUG.ENABLED:
        times = augmented_megapixels(question) / question.images.test_megapixels
        parts.append(f"the last one tests again with {times:.3g} times the pixels (TEST.AUG)")
    if test.BACKGROUND:
        parts.append("those before the last run beside the training (TEST.BACKGROUND)")
        if not knows_background(question):
            parts.append(
                f"their seconds on TEST.BACKGROUND_DEVICE {test.BACKGROUND_DEVICE!r} are not "
                "known, so no waiting for them counts"
            )
    return f"Evaluations: {'; '.join(parts)}." if parts else ""
