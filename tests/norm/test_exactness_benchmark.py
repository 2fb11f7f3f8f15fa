"""Runs the benchmark of exactness, and compares docs/cgbn.md with its results."""

import json
import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT

RESULTS = ROOT / "docs/results/exactness_cpu_2026-11-28.json"


def table(rows, device="cpu"):
    """Returns the Markdown lines of a results file: a name and a cell per norm."""
    lines: dict[str, list] = {}
    for name, _, at, _, cell, _ in rows:
        if at == device:
            lines.setdefault(name, [name]).append(cell)
    return [f"| {' | '.join(line)} |" for line in lines.values()]


def test_the_page_shows_the_committed_results():
    results = json.loads(RESULTS.read_text())
    page = (ROOT / "docs/cgbn.md").read_text().splitlines()
    head = next(i for i, line in enumerate(page) if "| CGBN |" in line)
    expected = table(results["rows"])
    assert page[head + 2 : head + 2 + len(expected)] == expected
    assert not page[head + 2 + len(expected)].startswith("|")


@pytest.mark.slow
def test_the_benchmark_measures_and_contains(tmp_path):
    output = tmp_path / "result.json"
    script = str(ROOT / "benchmarks/exactness.py")
    rows = ["N, H, W", "another width"]
    subprocess.run(
        [sys.executable, "-W", "ignore", script, "--rows", *rows, "--output", str(output)],
        check=True,
        timeout=250,
    )
    answers = {(r[0], r[3]): r[5] for r in json.loads(output.read_text())["rows"] if r[2] == "cpu"}
    ours, naive = (
        answers["N, H, W differ by rank", "CGBN"],
        answers["N, H, W differ by rank", "NaiveSync"],
    )
    assert len(ours) == 3
    assert all(error < 1e-6 for answer in ours for error in answer["value"].values())
    assert all(answer["value"]["y"] > 0.1 for answer in naive)
    # A peer that dies is a result, and ours names the layers.
    skipped = "rank 1 skips a layer, another width"
    assert [a["error"] for a in answers[skipped, "CGBN"]] == ["OutOfStepError"] * 2
    assert "aborts" in answers[skipped, "NaiveSync"][0]["end"]
