"""Finds INPUT and MODEL.PIXEL keys that contradict one another, where images would differ silently.

An own mapper or model may read other keys, so these are warnings.
"""

from collections.abc import Iterator

from detectron2.config import CfgNode

from megdet_d2.data.finding import Finding

IMAGENET_MEAN = (103.53, 116.28, 123.675)
"""Of blue, green and red, in [0, 255]: Detectron2's default."""
_OTHER_SCALE = 1.35  # between the sizes of an object in training and in the evaluation


def find_input_faults(cfg: CfgNode, eval_only: bool = False) -> Iterator[Finding]:
    """Yields warnings about sizes and pixel means that contradict other keys.

    Args:
        cfg: a config.
        eval_only: skip the keys that only a training uses.
    """
    for split in ("TEST",) if eval_only else ("TRAIN", "TEST"):
        yield from _find_size_out_of_reach(cfg.INPUT, split)
    yield from _find_other_test_size(cfg.INPUT)
    yield from _find_other_order(cfg)
    yield from _find_unit_range(cfg.MODEL)


def _shorter_sides(keys: CfgNode, split: str) -> tuple[int, ...]:
    shorter = keys[f"MIN_SIZE_{split}"]
    return tuple(shorter) if isinstance(shorter, (list, tuple)) else (shorter,)


def _find_size_out_of_reach(keys: CfgNode, split: str) -> Iterator[Finding]:
    shorter, longest = keys[f"MIN_SIZE_{split}"], keys[f"MAX_SIZE_{split}"]
    largest = max(_shorter_sides(keys, split), default=0)
    if largest > longest:
        yield Finding(
            "warning",
            "size-out-of-reach",
            f"INPUT.MIN_SIZE_{split} is {shorter}",
            "",
            f"no image is scaled to a shorter side of {largest}, since INPUT.MAX_SIZE_{split} "
            f"{longest} bounds the longer one",
            f"raise INPUT.MAX_SIZE_{split} to {largest} or more: for images of 4:3, "
            f"{round(largest * 4 / 3)}",
        )


def _find_other_test_size(keys: CfgNode) -> Iterator[Finding]:
    sides, (test,) = _shorter_sides(keys, "TRAIN"), _shorter_sides(keys, "TEST")
    if not (test and all(sides) and sides):  # 0 leaves images in their size
        return
    nearest = min(max(test, min(sides)), max(sides))
    if not 1 / _OTHER_SCALE <= test / nearest <= _OTHER_SCALE:
        yield Finding(
            "warning",
            "test-size",
            f"INPUT.MIN_SIZE_TEST is {test}",
            "",
            f"training has shorter sides of {keys.MIN_SIZE_TRAIN}, so objects are "
            f"{test / nearest:.2g} times as large in the evaluation, which lowers AP",
            f"set INPUT.MIN_SIZE_TEST {nearest}, and MAX_SIZE_TEST as MAX_SIZE_TRAIN",
        )


def _find_other_order(cfg: CfgNode) -> Iterator[Finding]:
    colours, mean = cfg.INPUT.FORMAT, tuple(cfg.MODEL.PIXEL_MEAN)
    orders = {"BGR": IMAGENET_MEAN, "RGB": IMAGENET_MEAN[::-1]}
    other = {"BGR": "RGB", "RGB": "BGR"}.get(colours)
    if other and _are_close(mean, orders[other]):
        yield Finding(
            "warning",
            "colour-order",
            f"INPUT.FORMAT is {colours!r}",
            "",
            f"MODEL.PIXEL_MEAN {list(mean)} is ImageNet's in the order {other}",
            f"set MODEL.PIXEL_MEAN {list(orders[colours])}, with MODEL.PIXEL_STD in the same "
            f"order, or INPUT.FORMAT {other}, as the weights need it",
        )


def _find_unit_range(keys: CfgNode) -> Iterator[Finding]:
    """Yields a warning where mean or deviation are those of pixels from 0 to 1."""
    mean, deviation = list(keys.PIXEL_MEAN), list(keys.PIXEL_STD)
    if (any(mean) and max(map(abs, mean)) <= 1) or min(deviation, default=1) < 1:
        yield Finding(
            "warning",
            "unit-range",
            f"MODEL.PIXEL_MEAN is {mean} and PIXEL_STD {deviation}",
            "",
            "Detectron2's pixels are from 0 to 255, and these are of pixels from 0 to 1",
            "give 255 times the values, in the order of INPUT.FORMAT",
        )


def _are_close(mean: tuple, expected: tuple) -> bool:
    return len(mean) == 3 and all(abs(a - b) < 0.5 for a, b in zip(mean, expected, strict=True))
