"""Fixtures of the tests of megdet ablate."""

import os

import pytest

from megdet_d2.ablation import local
from tests.helpers.ablation import TABLE3
from tests.helpers.paths import ROOT


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch):
    """Hides GPUs, so that rows for 128 GPUs are not refused, and polls trainings often."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(local, "POLL_SECONDS", 0.02)


@pytest.fixture
def listed(tmp_path):
    """Writes a YAML list of three rows of one config."""
    path = tmp_path / "rules.yaml"
    config = os.path.relpath(ROOT / TABLE3 / "14_b256_bn16.yaml", tmp_path)
    path.write_text(
        f"CONFIG: {config}\n"
        "ROWS:\n"
        "  linear: {}\n"
        "  half:\n"
        "    MEGDET.LR_FACTOR: 0.5\n"
        "    MEGDET.ABLATION.PAPER_AP: 36.0\n"
        "    MEGDET.ABLATION.PAPER_HOURS: null\n"
        "  none: {MEGDET.SCALING_RULE: none, MEGDET.ABLATION.PAPER_AP: null}\n"
    )
    return path
