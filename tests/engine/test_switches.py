"""Every pair of switches trains two updates, or is refused by name before the training."""

import itertools
import math

import pytest
import torch
from torch._dynamo.utils import counters

from megdet_d2.engine import compiled
from megdet_d2.engine.trackers import TrackRun
from tests.helpers.training import SHORT, train

SWITCHES = {
    "ema": ("MEGDET.EMA_DECAY", 0.9),
    "best": ("MEGDET.BEST_METRIC", "bbox/AP", "DATASETS.TEST", ("mixed",), "TEST.EVAL_PERIOD", 1),
    "background": ("TEST.BACKGROUND", True, "DATASETS.TEST", ("mixed",), "TEST.EVAL_PERIOD", 1),
    "channels_last": ("MODEL.CHANNELS_LAST", True),
    "compile": ("MODEL.COMPILE", True),
    "bfloat16": ("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", "bfloat16"),
    "fused_sgd": ("SOLVER.SGD_IMPLEMENTATION", "fused"),
    "float32": ("FLOAT32_PRECISION", "high"),
    "mlflow": ("MEGDET.TRACKERS", ("mlflow",)),
    "sublinear": ("MODEL.SUBLINEAR.ENABLED", True, "MODEL.SUBLINEAR.STAGES", ("res2", "fpn")),
    "fused_activation": ("MODEL.CGBN.FUSE_ACTIVATION", True),
    "accumulation": ("MEGDET.ACCUMULATION_STEPS", 2),
    "padding": ("MODEL.CGBN.IGNORE_PADDING", True),
}
REFUSED = {("compile", "padding"): "MODEL.COMPILE and MODEL.CGBN.IGNORE_PADDING"}
PAIRS = list(itertools.combinations(SWITCHES, 2))


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    precision = torch.get_float32_matmul_precision()
    monkeypatch.setattr(compiled, "BACKEND", "eager")  # traced, and no machine code
    monkeypatch.setattr(TrackRun, "before_train", lambda self: None)  # test_trackers.py runs them
    torch._dynamo.reset()
    counters.clear()
    yield
    torch.set_float32_matmul_precision(precision)


def train_with(names, coco, output):
    keys = [word for name in names for word in SWITCHES[name]]
    result = train(0, str(output), coco, (*SHORT, *keys))
    assert len(result["loss"]) == 2 and all(map(math.isfinite, result["loss"].values()))
    assert not counters["graph_break"] or "sublinear" in names
    return result


@pytest.mark.parametrize("without", ["compile"])
def test_all_together(coco, tmp_path, without):
    names = [name for name in SWITCHES if name != without]
    result = train_with(names, coco, tmp_path)
    assert result["ema"] and (tmp_path / "model_best.pth").is_file()
    assert (tmp_path / "ema" / "model_best.pth").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_a_pair(coco, tmp_path, pair):
    if pair in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[pair]):
            train_with(pair, coco, tmp_path)
    else:
        train_with(pair, coco, tmp_path)
