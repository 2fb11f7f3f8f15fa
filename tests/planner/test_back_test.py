"""Back-tests: published rows are those of their source, fits leave the others out, docs agree."""

import json

import numpy as np
import pytest

from megdet_d2.planner import command, epochs, gloo, mlperf, table3, zoo
from megdet_d2.planner.back_test import BackTest, Row, to_table, to_text
from scripts import planner_page
from tests.helpers.paths import ROOT

PAGE = (ROOT / "docs/planning.md").read_text()
RECORD = json.loads((ROOT / "docs/results/planner_back_test.json").read_text())


@pytest.fixture(scope="module")
def tests():
    return command.back_tests()


def test_errors_and_goal():
    rows = (Row("a", 10, 11, False), Row("b", 10, 8, False), Row("c", 10, 30, True))
    test = BackTest("t", "h", rows, {"c": "1 s"}, ("A note.",))
    assert [round(row.error, 6) for row in rows] == [0.1, -0.2, 2.0]
    assert test.errors(False) == pytest.approx([0.1, 0.2]) and not test.meets_goal
    assert "median error 15.0%, worst 20.0% (goal 10% and 30%: missed)." in test.summary()
    text = to_text(test)
    assert "| +200.0% | fitted " in text and "| -20.0%  | predicted |" in text
    assert "c = 1 s" in text and text.endswith("A note.")
    bad = BackTest("t", "h", (Row("far", 1, 2, False), Row("d", 1, 1, False)), {})
    assert "Outside 30%: far." in bad.summary()


def test_table_3_has_the_papers_rows():
    rows = {row.name: row for row in table3.paper_rows()}
    assert len(rows) == 19 and sum("long" in name for name in rows) == 6
    last = rows["14_b256_bn16"]
    assert (last.gpus, last.images, last.sublinear) == (128, 2, False)
    assert (last.iterations, last.hours) == (5070, 4.1)
    assert rows["08_b64_bn64"].sublinear and rows["08_b64_bn64"].hours == 40.9
    assert rows["13_b256_bn32"].topology.machines == 8


def test_the_fit_of_table_3_recovers_what_made_the_rows():
    truth = table3.Constants(0.4, 0.25, 0.1)
    rows = [
        table3.PaperRow(**{**vars(row), "hours": table3.predict(row, truth, 0.3)})
        for row in table3.paper_rows()
    ]
    found = table3.fit(tuple(rows[:11]), 0.3)
    assert vars(found) == pytest.approx(vars(truth), rel=0.02)


def test_predicted_rows_are_in_no_fit(monkeypatch, tests):
    """Whatever is measured beyond the fitted rows changes no prediction."""
    rows = tuple(
        table3.PaperRow(**{**vars(row), "hours": 1.0}) if row.gpus > 16 else row
        for row in table3.paper_rows()
    )
    monkeypatch.setattr(table3, "paper_rows", lambda: rows)
    changed = table3.back_test()
    assert [r.predicted for r in changed.rows] == [r.predicted for r in tests[0].rows]
    assert {row.fitted for row in changed.rows if row.measured == 1.0} == {False}

    other = tuple(
        system if system.is_fitted else mlperf.System(**{**vars(system), "images_per_s": 1.0})
        for system in mlperf.systems()
    )
    monkeypatch.setattr(mlperf, "systems", lambda: other)
    mlperf.variation.cache_clear()
    again = mlperf.back_test()
    mlperf.variation.cache_clear()
    assert [row.predicted for row in again.rows] == [row.predicted for row in tests[1].rows]
    assert sum(row.measured == 1.0 for row in again.rows) == 26


def test_mlperf_table():
    systems = {system.system: system for system in mlperf.systems()}
    large = systems["dgxh100_n48_ngc23.04_pytorch"]
    assert (large.machines, large.training_gpus, large.batch) == (48, 256, 256)
    assert large.topology.machines == 32  # 16 machines evaluate
    assert large.images_per_s / large.training_gpus == pytest.approx(93, abs=0.5)
    one = systems["dgxh100_ngc23.04_pytorch"]
    assert one.is_fitted and one.seconds == pytest.approx(96 / 1443.7)
    assert not [s for s in mlperf.systems() if s.is_fitted and s.machines > 1]
    assert not [s for s in mlperf.systems() if s.machines > 1 and not s.network_gbit]


def test_constants_come_from_the_nearest_machine():
    fitted = [system for system in mlperf.systems() if system.is_fitted]
    systems = {system.system: system for system in mlperf.systems()}
    source, chosen = mlperf.basis(systems["dgxa100_n48_ngc22.09_pytorch"], fitted)
    assert source == "same submitter, v2.1"
    assert [system.system for system in chosen] == ["dgxa100_ngc22.09_pytorch"]
    source, chosen = mlperf.basis(systems["nf5468m6j_pytorch"], fitted)
    assert source == "other submitters, v3.0" and chosen[0].hardware == "A40"
    assert mlperf.basis(chosen[0], fitted) == ("itself", chosen)
    unknown = mlperf.System("v3.0", "x", "x", "Z9", 2, 8, 32, 16, 400, 1.0)
    with pytest.raises(ValueError, match="no single machine with Z9"):
        mlperf.basis(unknown, fitted)


def test_epochs():
    model = epochs.EpochModel(12.5, 700)
    assert model.epochs(700) == 25 and model.factor(700, 1e-9) == pytest.approx(2)
    assert model.least_iterations() == pytest.approx(12.5 * 118_000 / 700)
    assert model.epochs(10**9) * 118_000 / 10**9 == pytest.approx(
        model.least_iterations(), rel=1e-5
    )
    assert model.hours(700, 3.6) == pytest.approx(25 * 118_000 / 700 / 1000)
    points = [
        epochs.Measured("x", b, runs, model.epochs(b)) for b, runs in ((8, 3), (64, 9), (256, 1))
    ]
    fitted = epochs.fit(points)
    assert (fitted.least, fitted.critical) == pytest.approx((12.5, 700))
    with pytest.raises(ValueError, match="no B_crit"):
        epochs.fit([epochs.Measured("x", b, 1, 10) for b in (8, 64)])
    with pytest.raises(ValueError, match="above 0"):
        epochs.EpochModel(1, 0)


def test_published_epochs():
    """FIELD: Mask R-CNN takes 14 epochs at 96 images and 17 to 18 at 256."""
    measured = {(p.benchmark, p.batch): p for p in epochs.measured()}
    assert measured["maskrcnn", 96].epochs == pytest.approx(14.2, abs=0.1)
    assert measured["maskrcnn", 256].epochs == pytest.approx(17.5, abs=0.1)
    assert measured["retinanet", 1024].epochs == 6


def test_goals_are_met_as_the_page_says(tests):
    titles = {test.title: test for test in tests}
    assert len(titles) == len(tests) == 7 + bool(gloo.measured())
    table_3, submissions, simulated = tests[:3]
    assert table_3.meets_goal
    for test in (submissions, simulated):
        errors = test.errors(fitted=False)
        assert len(errors) == 26 and np.median(errors) <= 0.10
        # Two rows of one system miss the worst case; see the page.
        assert sorted(errors)[-3] <= 0.30 < sorted(errors)[-2]
    for test in tests:
        assert test.summary() in PAGE


def test_the_page_and_the_record_have_these_rows(tests):
    for test, recorded in zip(tests, RECORD["tests"], strict=True):
        assert [row["name"] for row in recorded["rows"]] == [row.name for row in test.rows]
        predicted = [row["predicted"] for row in recorded["rows"]]
        assert predicted == pytest.approx([row.predicted for row in test.rows], rel=1e-4)
    assert to_table(tests[0].rows, "h") in PAGE
    assert to_table([row for row in tests[1].rows if not row.fitted], "images/s") in PAGE


def test_the_zoo_is_scaled_from_one_model():
    test = zoo.back_test()
    assert [row.name for row in test.rows if row.fitted] == ["mask_rcnn_R_50_FPN_1x"]
    (fitted,) = (row for row in test.rows if row.fitted)
    assert abs(fitted.error) < 0.02  # the all-reduce of its gradients
    rows = {row.name: row for row in test.rows}
    assert rows["faster_rcnn_R_50_FPN_1x"].measured == 0.210
    assert np.median(test.errors(fitted=False)) <= 0.15


def test_the_fit_of_gloo_recovers_what_made_the_rows():
    alone = {"a": 0.2, "b": 0.1, "c": 0.3}
    models = [("a", 50, 10_000_000), ("b", 0, 10_000_000), ("c", 20, 40_000_000)]
    rows = [gloo.Measured(m, p, 2, n, w, 0.0) for m, n, w in models for p in (1, 2, 4, 8)]
    constants = (1e-3, 1e-4, 1e-9)
    rows = [
        gloo.Measured(**{**vars(row), "seconds": gloo.predict(row, alone, constants)})
        for row in rows
    ]
    found, fitted = gloo.fit([row for row in rows if row.processes < 8])
    assert found == alone and fitted == pytest.approx(constants)
    last = rows[3]  # 8 processes on 2 cores: 101 messages of 14 hops, 1.75 times the bytes
    assert last.seconds == pytest.approx(4 * (0.2 + 101e-3 + 14 * 101e-4 + 1.75 * 0.04))
    faster = [gloo.Measured(**{**vars(r), "seconds": alone[r.model]}) for r in rows[:2]]
    assert gloo.fit(faster)[1] == (0, 0, 0)  # no time below 0


@pytest.mark.skipif(not gloo.measured(), reason="benchmarks/planner_gloo.py has not run")
def test_rows_of_eight_processes_are_in_no_fit(monkeypatch, tests):
    rows = tuple(
        gloo.Measured(**{**vars(row), "seconds": 1.0}) if row.processes > 4 else row
        for row in gloo.measured()
    )
    before = gloo.back_test()
    monkeypatch.setattr(gloo, "measured", lambda: rows)
    after = gloo.back_test()
    assert [row.predicted for row in after.rows] == [row.predicted for row in before.rows]


def test_the_tables_of_this_code_are_written_from_the_committed_files():
    assert planner_page.render(PAGE) == PAGE, "run  python scripts/planner_page.py"
    if not gloo.measured():
        return
    record = sorted((ROOT / "docs/results").glob("planner_gloo_*.json"))[-1]
    rows = json.loads(record.read_text())["rows"]
    assert [(row["model"], row["processes"], row["seconds"]) for row in rows] == [
        (row.model, row.processes, row.seconds) for row in gloo.measured()
    ]
