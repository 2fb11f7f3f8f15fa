"""Loading a checkpoint runs no code that its author put there, also on torch before 2.6."""

import functools
import os
import pickle
import re
from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from megdet_d2.engine.checkpoint import Checkpointer
from megdet_d2.engine.weights_only import WeightsOnlyCheckpointer
from tests.helpers.paths import TRAIN_NET


class Touch:
    """Unpickling it creates a file: the least harmful code that a test can see."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture(params=["torch of today", "torch before 2.6"])
def any_torch(request, monkeypatch):
    if request.param == "torch before 2.6":  # its default; the environment decides as it did then
        monkeypatch.setattr(torch, "load", functools.partial(torch.load, weights_only=False))
    return request.param


@pytest.mark.parametrize("cls", [WeightsOnlyCheckpointer, Checkpointer])
@pytest.mark.parametrize("suffix", ["pth", "pyth"])
def test_a_malicious_file_is_refused_and_does_not_run(tmp_path, any_torch, cls, suffix):
    ran, path = tmp_path / "ran", str(tmp_path / f"model.{suffix}")
    key = {"pth": "model", "pyth": "model_state"}[suffix]
    torch.save({key: nn.Linear(2, 2).state_dict(), "extra": Touch(ran)}, path)
    with pytest.raises(pickle.UnpicklingError, match=rf"{path} holds more than tensors"):
        cls(nn.Linear(2, 2)).load(path)
    assert not ran.exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_the_file_would_run_where_torch_lets_it(tmp_path, monkeypatch):
    """Checks the test above: the same file, by Detectron2 on an older torch."""
    monkeypatch.setattr(torch, "load", functools.partial(torch.load, weights_only=False))
    ran, path = tmp_path / "ran", str(tmp_path / "model.pth")
    torch.save({"model": nn.Linear(2, 2).state_dict(), "extra": Touch(ran)}, path)
    DetectionCheckpointer(nn.Linear(2, 2)).load(path)
    assert ran.exists()


def test_a_plain_file_loads(tmp_path, any_torch):
    model = nn.Linear(2, 2)
    path = str(tmp_path / "model.pth")
    torch.save({"model": model.state_dict(), "iteration": 3}, path)
    other = nn.Linear(2, 2)
    assert WeightsOnlyCheckpointer(other).load(path)["iteration"] == 3
    assert torch.equal(other.weight, model.weight)


def test_a_user_who_trusts_a_file_can_say_so(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    ran, path = tmp_path / "ran", str(tmp_path / "model.pth")
    torch.save({"model": nn.Linear(2, 2).state_dict(), "extra": Touch(ran)}, path)
    WeightsOnlyCheckpointer(nn.Linear(2, 2)).load(path)
    assert ran.exists()


def test_the_environment_is_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0")
    path = str(tmp_path / "model.pth")
    torch.save({"model": nn.Linear(2, 2).state_dict()}, path)
    WeightsOnlyCheckpointer(nn.Linear(2, 2)).load(path)
    assert os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] == "0"


def test_the_package_loads_by_no_other_class():
    """``train_net.py``, ``megdet ensemble`` and ``megdet variance`` too."""
    root, stock = Path(TRAIN_NET).parent, []
    for path in [Path(TRAIN_NET), *(root / "megdet_d2").rglob("*.py")]:
        text = path.read_text().replace("(DetectionCheckpointer)", "")
        text = re.sub(r"torch\.load\([^()]*weights_only=True\)", "", text)  # runs no code
        if "DetectionCheckpointer(" in text or "torch.load(" in text:
            stock.append(str(path.relative_to(root)))
    assert not stock
