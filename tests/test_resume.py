"""A run that was stopped goes on as if it had not been."""

import pytest

from .training import copy_checkpoint, differing, train, write_images


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("mixed"))


def same(whole, resumed):
    """The resumed run is the rest of the whole one, bit by bit, in every process."""
    start = resumed[0]["start"]
    for rank, (a, b) in enumerate(zip(whole, resumed, strict=True)):
        assert b["images"] == a["images"][start:], f"rank {rank} sees other images"
        assert differing(a["state"], b["state"]) == [], f"rank {rank}"
        assert differing(a["momentum"], b["momentum"]) == [], f"rank {rank}"
        assert b["images_seen"] == a["images_seen"]
    assert b["lr"] == {i: v for i, v in a["lr"].items() if i in b["lr"]}
    a, b = whole[0]["loss"], resumed[0]["loss"]
    assert {i: v for i, v in b.items() if i >= start} == {i: v for i, v in a.items() if i >= start}


@pytest.fixture(scope="module")
def four(pool4, coco, tmp_path_factory):
    """Four processes in groups of two, never stopped."""
    output = str(tmp_path_factory.mktemp("four"))
    overrides = ("MODEL.CGBN.BN_SIZE", 4)
    return output, overrides, pool4.run(train, output, coco, overrides, timeout=240)


@pytest.mark.parametrize("stopped_after", [0, 2, 4])
def test_resumed_in_groups_smaller_than_the_world(pool4, coco, four, tmp_path, stopped_after):
    whole, overrides, result = four
    output = str(tmp_path / "resumed")
    copy_checkpoint(whole, output, f"model_{stopped_after:07d}.pth")
    workers = ("DATALOADER.NUM_WORKERS", 2) if stopped_after == 2 else ()
    resumed = pool4.run(train, output, coco, (*overrides, *workers), True, timeout=240)
    assert resumed[0]["start"] == stopped_after + 1
    same(result, resumed)
