"""Measurements of the link between real processes, and of a config's own steps."""

import json

import pytest

import megdet_cli
from megdet_d2.planner import hardware
from megdet_d2.planner.collectives import LARGE, SMALL, time_all_reduces, to_link
from megdet_d2.planner.topology import Topology, all_reduce
from tests.helpers.paths import TINY
from tests.helpers.training import write_images


@pytest.mark.parametrize("processes", [2, 5])
def test_a_link_gives_the_seconds_it_was_made_of(processes):
    topology = Topology(1, processes, to_link(processes, 1e-4, 3e-2))
    assert all_reduce(topology, LARGE) == pytest.approx(3e-2, rel=1e-6)
    # The bytes of a small message take some of its time.
    assert all_reduce(topology, SMALL) == pytest.approx(1e-4, rel=0.1)
    assert to_link(2, 1e-9, 1e-9).small == 0  # faster than NCCL can start


def test_all_reduces_of_real_processes():
    times = time_all_reduces(2, "cpu")
    assert set(times) == {SMALL, LARGE} and 0 < times[SMALL] < times[LARGE]


@pytest.mark.slow
def test_measured_hardware_is_planned_with(tmp_path, capsys):
    coco = write_images(tmp_path)
    words = ["DATASETS.COCO", json.dumps(coco), "DATASETS.TRAIN", '["mixed"]', "DATASETS.TEST",
             "[]", "MODEL.ROI_HEADS.NUM_CLASSES", "1", "MEGDET.ACCUMULATION_STEPS", "1",
             "SOLVER.IMS_PER_BATCH", "4"]  # fmt: skip
    output = tmp_path / "plan"
    megdet_cli.main(
        ["plan", TINY, "--gpus", "2", "--measure", "1", "--output", str(output), *words]
    )
    text = capsys.readouterr().out
    assert f"plan with it by --hardware {output}/hardware.json" in text
    found = hardware.read(output / "hardware.json")
    assert found.config == TINY and found.slots >= 1 and found.loader > 0
    assert 0 < found.seconds_per_image and 0 <= found.variation <= 1 and found.host >= 0
    assert found.inside.small > 0 and found.inside.bandwidth > 0
    assert f"{1e3 * found.seconds_per_image * found.sharing(2):.3g} ms per image" in text
