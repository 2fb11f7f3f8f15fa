"""Tests the pictures of the report by their pixels."""

import builtins

import numpy as np
import pytest
from detectron2.data import MetadataCatalog

from megdet_d2.report import plots, tables
from megdet_d2.report.run import Run
from tests.helpers.runs import (
    EVAL_ROW,
    TRAIN_ROW,
    needs_demo_extra,
    pixels,
    read_results,
    write_results,
    write_run,
)

pytestmark = needs_demo_extra


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
    first, *others = read_results(run)
    write_results(run, [first])
    alone = pixels(plots.draw_detections(run, run / "detections.png"))
    write_results(run, [first, *(result | {"score": 0.49} for result in others)])
    assert np.array_equal(pixels(plots.draw_detections(run, run / "detections.png")), alone)


def test_if_all_scores_are_low_the_best_are_drawn_and_the_title_says_from_which_score(
    run, monkeypatch
):
    """Otherwise every panel would be blank, as early in a training."""
    drawn = []
    monkeypatch.setattr(plots, "draw_box", lambda axes, box, index, label: drawn.append(label))
    results = read_results(run)
    low = [result | {"score": 0.3} for result in results]
    lower = [result | {"score": 0.2} for result in results] * 3
    write_results(run, [*lower, *low])
    titles = titles_of(plots.draw_detections, run, run / "detections.png", 4)
    assert sum("0.30" in label for label in drawn) == len(results) > 0
    assert not any("0.20" in label for label in drawn)
    assert "detections, score >= 0.3" in titles


def titles_of(draw, *args):
    """Returns the titles of all panels of a figure."""
    titles = []
    save = plots.save_figure

    def look(figure, path):
        titles.extend(axes.get_title() for axes in figure.axes)
        return save(figure, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "save_figure", look)
        draw(*args)
    return titles


@pytest.mark.parametrize("name", [r"$\frac{a$", "$x$", "a$b", r"\$5 $"])
def test_a_dollar_in_the_name_of_a_class_or_a_run_is_a_character(run, tmp_path, name):
    metadata = MetadataCatalog.get("megdet_digits_val")
    names = metadata.thing_classes
    picture = plots.draw_detections(run, tmp_path / "plain.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "register_datasets", lambda cfg: None)
        patch.setitem(metadata.__dict__, "thing_classes", [name] * len(names))
        drawn = pixels(plots.draw_detections(run, tmp_path / "named.png"))
    assert drawn.shape == pixels(picture).shape
    folder = write_run(tmp_path / name.replace("\\", ""))
    assert plots.plot_accuracy([Run.read(folder)] * 2, tmp_path / "accuracy.png").is_file()
    assert plots.plot_curves(folder, tmp_path / "curves.png").is_file()


def test_labels_are_the_names_of_the_jsons_category_ids(run, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "draw_box", lambda axes, box, index, label: drawn.append(label))
    plots.draw_detections(run, run / "detections.png", num_images=4)
    truth = sorted(label for label in drawn if "." not in label)
    assert truth and truth == sorted(label.split()[0] for label in drawn if "." in label)
    assert {label.split()[1] for label in drawn if "." in label} == {"0.90"}


def test_one_image_and_more_than_there_are(run):
    assert pixels(plots.draw_detections(run, run / "detections.png", num_images=1)).shape[1] == 700
    assert (
        pixels(plots.draw_detections(run, run / "detections.png", num_images=99)).shape[1] == 1400
    )


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
