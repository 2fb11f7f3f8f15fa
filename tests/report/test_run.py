"""Tests how a run is read: metrics as Detectron2 writes them, its numbers, its config."""

import json
import math

import numpy as np
import pytest
from detectron2.utils.events import EventStorage, JSONWriter

from megdet_d2.cli import main
from megdet_d2.config import load_config
from megdet_d2.report import plots
from megdet_d2.report.run import Run, labels, read_metrics
from tests.helpers.runs import TRAIN_ROW, needs_demo_extra, write_run

pytestmark = needs_demo_extra


def test_rows_with_nan_are_sorted_into_training_and_evaluation(run):
    train_rows, eval_rows = read_metrics(run)
    assert [row["iteration"] for row in train_rows] == [19, 39]
    assert [(row["iteration"], row["bbox/AP"]) for row in eval_rows] == [(9, 10.0), (40, 20.5)]
    assert math.isnan(eval_rows[0]["bbox/APm"]) and math.isnan(train_rows[0]["loss_rpn_cls"])


def test_detectron2s_own_writer_is_understood(tmp_path):
    writer = JSONWriter(str(tmp_path / "metrics.json"))
    with EventStorage() as storage:
        for iteration in range(4):
            storage.iter = iteration
            storage.put_scalars(total_loss=3.0 - iteration, lr=0.1)
            if iteration in (1, 3):  # one between two writes, one together with a write
                storage.put_scalars(**{"bbox/AP": float(iteration)}, smoothing_hint=False)
            if iteration != 1:
                writer.write()
    writer.close()
    train_rows, eval_rows = read_metrics(tmp_path)
    assert [row["iteration"] for row in train_rows] == [0, 2, 3]
    assert [(row["iteration"], row["bbox/AP"]) for row in eval_rows] == [(1, 1.0), (3, 3.0)]


def test_a_resumed_runs_rows_replace_the_older_and_a_torn_line_is_left_out(run, caplog):
    with open(run / "metrics.json", "a") as file:
        file.write('{"iteration": 59, "total\n' + TRAIN_ROW % (39, 7.0) + TRAIN_ROW % (59, 6.0))
    train_rows, eval_rows = read_metrics(run)
    assert [(row["iteration"], row["total_loss"]) for row in train_rows] == [
        (19, 2.0),
        (39, 7.0),
        (59, 6.0),
    ]
    assert len(eval_rows) == 2
    assert "metrics.json: line 5 is not json" in caplog.text


def test_a_run_as_numbers(tmp_path):
    run = Run.read(write_run(tmp_path / "a", batch_size=8))
    iterations, aps = run.evaluations()
    # The last evaluation is written one iteration after the last training iteration.
    assert iterations.tolist() == [50, 110] and aps.tolist() == [15.0, 30.0]
    assert run.epochs(iterations).tolist() == [5, 11]
    assert run.final("AP50") == 60
    # 100 of the 110 iterations are logged, at half a second, as medians of another trainer.
    assert run.hours() == pytest.approx(100 * 0.5 / 3600)
    assert run.hours_at(np.array([50])) == pytest.approx(50 * 0.5 / 3600)
    assert run.images_per_second() == pytest.approx(16)


def test_hours_are_those_of_all_iterations(tmp_path):
    """The loader stalls in one iteration of five, which a median does not show."""
    folder = write_run(tmp_path / "a", batch_size=8)
    rows = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    rows = [r | {"training_time": r["iteration"] + 1.0} if "time" in r else r for r in rows]
    (folder / "metrics.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = Run.read(folder)
    assert run.hours() == pytest.approx(100 / 3600)
    assert run.hours_at(np.array([50])) == pytest.approx(50 / 3600)
    assert run.images_per_second() == pytest.approx(8)


def test_a_config_that_was_cut_off_is_named(run):
    for text in ("", "MODEL: {DEVICE: ["):
        (run / "config.yaml").write_text(text)
        with pytest.raises(SystemExit, match="config.yaml is no config"):
            main(["report", str(run)])


def test_a_run_of_a_stranger_runs_no_code(run, tmp_path):
    tag = f"!!python/object/apply:os.mkdir [{tmp_path / 'ran'}]"
    (run / "config.yaml").write_text(f"MODEL: {{WEIGHTS: {tag}}}\nVERSION: 2\n")
    with pytest.raises(SystemExit, match="config.yaml is no config"):
        main(["report", str(run)])
    assert not (tmp_path / "ran").exists()


def test_a_run_resumed_with_another_mini_batch_counts_images(tmp_path):
    """It has 100 iterations of 16 images, and from a checkpoint after 80 goes on with 40 of 32."""
    folder = write_run(tmp_path / "a", batch_size=32)

    def rows(batch_size, seconds, first, last):
        return [
            {
                "iteration": i,
                "total_loss": 1.0,
                "time": seconds,
                "images_seen": (i + 1) * batch_size,
            }
            | {"effective_batch_size": batch_size}
            for i in range(first, last, 20)
        ]

    before, after = rows(16, 0.5, 19, 100), rows(32, 0.75, 59, 111)
    before.insert(3, {"iteration": 74, "bbox/AP": 10.0})  # after 1,200 images
    last = {"iteration": 109, "total_loss": 1.0, "time": 0.75, "images_seen": 110 * 32}
    after += [last | {"effective_batch_size": 32}, {"iteration": 110, "bbox/AP": 20.0}]
    # A separate evaluation at iteration 41 has the mini-batch of the next row, not of the last one.
    lines = [*before, {"iteration": 41, "bbox/AP": 12.0}, *after]
    metrics = folder / "metrics.json"
    metrics.write_text("".join(json.dumps(row) + "\n" for row in lines))
    run = Run.read(folder)
    iterations, aps = run.evaluations()
    assert aps.tolist() == [10.0, 12.0, 20.0] and run.final() == 20
    assert iterations.tolist() == [38, 42, 110]  # 1,200 images are 37.5 iterations of 32
    # The row of the 100th iteration stays, because the second part reaches its images later.
    done, _ = run.series("time")
    assert done.tolist() == [10, 20, 30, 40, 50, 60, 80, 100, 110]
    assert run.hours() * 3600 == pytest.approx(100 * 0.5 + 60 * 0.75)
    assert plots.plot_curves(folder, folder / "curves.png").is_file()
    assert run.throughput()[1].tolist() == pytest.approx([32] * 5 + [32 / 0.75] * 4)

    unfinished = [*before, {"iteration": 41, "bbox/AP": 12.0}]
    metrics.write_text("".join(json.dumps(row) + "\n" for row in unfinished))
    assert Run.read(folder).final() is None


def test_a_run_that_has_not_ended_has_no_final_ap(tmp_path):
    folder = write_run(tmp_path / "a")
    metrics = folder / "metrics.json"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:-1]))
    assert Run.read(folder).final() is None and len(Run.read(folder).evaluations()[0]) == 1


def test_runs_are_told_apart_by_their_paths(tmp_path):
    runs = [Run.read(write_run(tmp_path / name / "seed1")) for name in ("b16", "b256")]
    assert labels(runs) == ["b16/seed1", "b256/seed1"]
    assert labels(runs[:1]) == ["seed1"]


def test_a_second_training_in_the_same_folder_replaces_the_first(tmp_path):
    """The first was evaluated more often: its AP would look like those of the second."""
    folder = write_run(tmp_path / "a")
    metrics = folder / "metrics.json"
    first = metrics.read_text()
    train_rows = [line for line in first.splitlines(keepends=True) if "total_loss" in line]
    early = '{"iteration": 9, "bbox/AP": 5.0}\n'
    metrics.write_text(early + first + "".join(train_rows[:2]))
    run = Run.read(folder)
    assert run.series("time")[0].tolist() == [20, 40]
    assert run.evaluations()[0].tolist() == [] and run.final() is None
    # A resume goes on from a later iteration, and keeps what came before.
    metrics.write_text(early + first + "".join(train_rows[2:]))
    assert Run.read(folder).evaluations()[0].tolist() == [10, 50, 110]


@pytest.mark.parametrize(
    ("decay", "augmented", "expected"),
    [(0.0, False, 1), (0.9, False, 2), (0.0, True, 3), (0.9, True, 4)],
)
def test_the_result_is_that_of_the_model_the_config_asks_for(tmp_path, decay, augmented, expected):
    """With an average of the weights, the last weights are not the training's result."""
    cfg = load_config()
    cfg.SOLVER.MAX_ITER, cfg.MEGDET.POLICY = 5, ""
    cfg.MEGDET.EMA_DECAY, cfg.TEST.AUG.ENABLED = decay, augmented
    (tmp_path / "config.yaml").write_text(cfg.dump())
    values = {"bbox/AP": 1.0, "bbox_EMA/AP": 2.0, "bbox_TTA/AP": 3.0, "bbox_EMA_TTA/AP": 4.0}
    rows = [{"iteration": 4, "total_loss": 1.0}, {"iteration": 5, **values}]
    (tmp_path / "metrics.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert Run.read(tmp_path).final() == expected
