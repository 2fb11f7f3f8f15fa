"""The demo, as `make demo` runs it, reaches what README says it reaches."""

import json
import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT

CONFIG = "configs/Digits-Detection/megdet_R18_FPN_b32_bn32.yaml"


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_demo(tmp_path):
    makefile = (ROOT / "Makefile").read_text()
    assert f"DEMO_CONFIG := {CONFIG}" in makefile
    for command in (
        f"train_net.py --config-file {CONFIG} --num-gpus 2 --dist-url auto OUTPUT_DIR {tmp_path}",
        f"-m megdet_cli report {tmp_path}",
    ):
        result = subprocess.run(
            [sys.executable, "-W", "ignore", *command.split()],
            cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    for picture in ("curves.png", "detections.png"):
        assert picture in result.stdout and (tmp_path / picture).stat().st_size > 10_000
    rows = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    final = [row for row in rows if "bbox/AP" in row][-1]
    assert final["bbox/AP"] >= 20 and final["bbox/AP50"] >= 40
