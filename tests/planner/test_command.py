"""The megdet plan command: its text, its json, its plot, and what it refuses."""

import json

import pytest

import megdet_cli
from megdet_d2.planner import gloo

SMALL = ["plan", "--simulate", "--machines", "1,4", "--steps", "5", "--seconds-per-image", "0.1"]


def test_a_simulation_prints_its_points_shares_and_warnings(capsys, tmp_path):
    megdet_cli.main([*SMALL, "--bn-size", "8", "--output", str(tmp_path / "new")])
    text = capsys.readouterr().out
    assert "100.00 ms per image (--seconds-per-image)" in text
    assert "| 32     | 64 " in text and "Shares of the simulated time" in text
    assert "BN size 8 is under 16" in text and "at least 2,107 iterations" in text
    assert (tmp_path / "new/simulation.png").read_bytes().startswith(b"\x89PNG")


def test_json_has_the_same(capsys):
    megdet_cli.main([*SMALL, "--json", "--bn-size", "0", "--target-batch", "64"])
    found = json.loads(capsys.readouterr().out)
    assert [point["micro_batches"] for point in found["points"]] == [4, 1]
    assert found["norm"] == [] and found["points"][0]["simulated"]["norm"] == 0
    assert sum(found["points"][0]["shares"].values()) == pytest.approx(1)


def test_preset_hardware(capsys):
    line = ["plan", "--simulate", "--machines", "1", "--steps", "2", "--hardware", "H100-SXM-80GB"]
    megdet_cli.main([*line, "--json"])
    fast = json.loads(capsys.readouterr().out)["points"][0]["closed_form"]["compute"]
    assert fast == pytest.approx(2 * 0.00493, rel=0.05)  # 66.5 ms / (12 + 0.3 √12 1.42)


def test_checkpoints_that_take_long_are_warned_of(capsys):
    megdet_cli.main([*SMALL, "--checkpoint-period", "10"])
    text = capsys.readouterr().out
    assert "of the time on 32 GPUs: save less often, by --checkpoint-period" in text


@pytest.mark.parametrize(
    "words, message",
    [
        (["--hardware", "A99"], "--hardware A99 is not in MLPerf's table; use one of A100-PCIe"),
        (["--bn-size", "3"], "--bn-size 3 is no multiple of --images-per-gpu 2"),
        (["--images-per-gpu", "0"], "--images-per-gpu is 0; give 1 or more"),
        (["--network-gbit", "0"], "--network-gbit is 0"),
        (["--target-batch", "7"], "a batch of 7 is no multiple of 8 GPUs with 2 images each"),
        (["--critical-batch", "0"], "B_crit 0.0; give numbers above 0"),
        (["--seconds-per-image", "0"], "0.0 s per image"),
        (["--mtbf-hours", "0"], "a failure every 0.0 h"),
    ],
)
def test_mistakes_are_one_line(words, message):
    line = SMALL[:-2] if words[0] == "--hardware" else SMALL
    with pytest.raises(SystemExit) as error:
        megdet_cli.main([*line, *words])
    assert message in str(error.value)


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "give a CONFIG, or one of the arguments --back-test --simulate"),
        (["--simulate", "--back-test"], "not allowed with argument"),
        (["--simulate", "x.yaml"], "x.yaml and --simulate: give one of them"),
        (["--simulate", "--gpu-memory", "24"], "--gpu-memory needs a CONFIG"),
        (["x.yaml", "--bn-size", "0"], "--bn-size is for --simulate; a config has its own keys"),
        (["x.yaml", "--seed", "1"], "--seed is for --simulate"),
        (["--dry-run"], "--dry-run needs a CONFIG"),
        (["x.yaml", "--dry-run", "--report"], "--report is not for --dry-run"),
        (["x.yaml", "SEED"], "unrecognized arguments: SEED"),
    ],
)
def test_one_task_is_needed(words, message, capsys):
    with pytest.raises(SystemExit):
        megdet_cli.main(["plan", *words])
    assert message in capsys.readouterr().err


def test_the_back_test_prints_every_row(capsys):
    megdet_cli.main(["plan", "--back-test", "--json"])
    tests = json.loads(capsys.readouterr().out)
    own = [20] if gloo.measured() else []
    assert [len(test["rows"]) for test in tests] == [19, 128, 26, 16, *own, 11, 7, 11]
    assert {row["fitted"] for row in tests[0]["rows"]} == {True, False}
    first = tests[0]["rows"][0]
    assert first["error"] == pytest.approx(first["predicted"] / first["measured"] - 1)
