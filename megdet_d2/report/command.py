"""``megdet report``: curves, tables and detections of one or more runs, as PNG and one HTML page.

megdet report output/demo
megdet report output/table3/06_b16_bn16 output/table3/14_b256_bn16
"""

import argparse
import json
import re
import sys
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.structures import BoxMode

from megdet_d2.data import register_datasets

from .page import write_page
from .plots import labels, overview, plot_accuracy, plot_health, plot_samples, table1
from .run import Run, existing, read_config, read_metrics
from .style import make_figure, tidy

SCORE_THRESHOLD = 0.5
_EVALUATE = "evaluate: train_net.py --eval-only --resume --config-file {run}/config.yaml"


def plot_curves(run: str | Path, path: Path) -> Path:
    """Draws learning rate, losses and box AP over the iterations.

    Over the images seen where the mini-batch has changed.
    """
    train_rows, eval_rows = read_metrics(run)
    changed = len({row.get("effective_batch_size") for row in train_rows}) > 1
    at = "images_seen" if changed else "iteration"
    losses = sorted({key for row in train_rows for key in row if key.startswith("loss_")})
    # With several test sets the keys begin with the set's name.
    aps = sorted(k for k in set().union(*eval_rows) if re.search(r"(^|/)bbox/AP(50)?$", k))
    figure = make_figure(10, 9)
    figure.suptitle(str(run))
    panels = figure.subplots(3, sharex=True, height_ratios=(1, 2, 2))
    contents = (
        ("learning rate", train_rows, ["lr"]),
        ("loss", train_rows, ["total_loss", *losses]),
        ("box AP (%)", eval_rows, aps),
    )
    for axes, (title, rows, keys) in zip(panels, contents, strict=True):
        for key in keys:
            of_key = [row for row in rows if key in row and at in row]
            x, y = ([row[column] for row in of_key] for column in (at, key))
            marker = "." if len(of_key) < 50 else None  # an AP alone is no line
            axes.plot(x, y, marker=marker, label=key, linewidth=2.5 if "total" in key else 1.5)
        axes.set_title(title, loc="left")
        axes.set_ylim(bottom=0)
        tidy(axes)
        if rows and len(keys) > 1:
            axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    panels[-1].set_xlabel(at.replace("_", " "))
    figure.savefig(path)
    return path


def draw_detections(run: str | Path, path: Path, num_images: int = 8) -> Path:
    """Draws ground truth beside detections for the first test images.

    Raises:
        FileNotFoundError: no config.yaml, or no results of an evaluation.
        ValueError: no test set, results that cannot be read, or no image asked for.
    """
    if num_images < 1:
        raise ValueError(f"--images is {num_images}; draw 1 or more")
    cfg = read_config(run)
    if not cfg.DATASETS.TEST:
        raise ValueError(f"DATASETS.TEST of {run}/config.yaml is empty: no detections to draw")
    register_datasets(cfg)
    name = cfg.DATASETS.TEST[0]
    folder = "inference" if len(cfg.DATASETS.TEST) == 1 else f"inference/{name}"
    results_file = existing(run, f"{folder}/coco_instances_results.json", _EVALUATE)
    try:
        results = json.loads(results_file.read_text())
    except ValueError as e:
        raise ValueError(f"{results_file} is not json ({e}); {_EVALUATE.format(run=run)}") from None
    images = DatasetCatalog.get(name)[:num_images]
    names = MetadataCatalog.get(name).thing_classes
    # The results hold the annotation json's category ids, Detectron2's data sets classes from 0.
    to_class = MetadataCatalog.get(name).get("thing_dataset_id_to_contiguous_id", {})

    columns = 2 * min(2, len(images))
    rows = -(-2 * len(images) // columns)
    aspect = max(image["height"] / image["width"] for image in images)
    figure = make_figure(3.5 * columns, (3.4 * aspect + 0.35) * rows)
    blank = {"xticks": [], "yticks": [], "frame_on": False}
    panels = figure.subplots(rows, columns, squeeze=False, subplot_kw=blank).flatten()
    for image, truth, detections in zip(images, panels[::2], panels[1::2], strict=False):
        pixels = read_image(image["file_name"], "RGB")
        truth.set_title(f"{Path(image['file_name']).name}, ground truth", fontsize=9)
        truth.imshow(pixels)
        for box in image.get("annotations", []):
            xywh = BoxMode.convert(box["bbox"], box["bbox_mode"], BoxMode.XYWH_ABS)
            _draw_box(truth, xywh, box["category_id"], names[box["category_id"]])
        detections.set_title(f"detections, score >= {SCORE_THRESHOLD}", fontsize=9)
        detections.imshow(pixels)
        for result in results:
            if result["image_id"] == image["image_id"] and result["score"] >= SCORE_THRESHOLD:
                index = to_class.get(result["category_id"], result["category_id"])
                label = f"{names[index]}  {result['score']:.2f}"
                _draw_box(detections, result["bbox"], index, label)
    figure.savefig(path)
    return path


def _draw_box(axes, xywh: list[float], index: int, label: str) -> None:
    x, y, width, height = xywh
    colour = f"C{index % 10}"
    corners_x, corners_y = [x, x + width, x + width, x, x], [y, y, y + height, y + height, y]
    axes.plot(corners_x, corners_y, color=colour, scalex=False, scaley=False)
    # Above the box's left corner, or where the image's edges do not cut it off.
    right, bottom = axes.get_xlim()[1], axes.get_ylim()[0]
    at, ha = (min(x + width, right), "right") if x > 0.8 * right else (max(x, 0), "left")
    va = "top" if y < 0.06 * bottom else "bottom"
    ground = {"facecolor": colour, "edgecolor": "none", "pad": 1}
    text = axes.text(at, max(y, 0), label, color="white", fontsize=8, ha=ha, va=va, bbox=ground)
    text.set_clip_on(True)


def summarize(run: str | Path) -> str:
    """The final AP, the time that training took, and where to look next."""
    run = Path(run)
    final = (read_metrics(run)[1] or [{}])[-1]
    lines = [
        f"{key} {final[key]:.1f}, AP50 {final[key + '50']:.1f} (%)"
        for key in sorted(final)
        if key.endswith("bbox/AP")
    ]
    log = run / "log.txt"
    times = re.findall(r"Total training time: (.+?) \(", log.read_text()) if log.is_file() else []
    lines += [f"Training took {time} (h:mm:ss), evaluation included." for time in times[-1:]]
    lines.append(f"Numbers:  {run / 'metrics.json'}, {log}")
    lines.append(f"Scalars:  {Path(sys.executable).parent / 'tensorboard'} --logdir {run}")
    return "\n".join(lines)


def run(args: argparse.Namespace) -> None:
    """Draws and writes all there is, and only then says what was missing."""
    runs = [Run.read(path) for path in args.runs]
    output = args.output or (runs[0].path if len(runs) == 1 else Path("output/report"))
    output.mkdir(parents=True, exist_ok=True)
    sections: list[tuple[str, object]] = [
        ("Runs", overview(runs)),
        ("Accuracy (Figures 1 and 4)", plot_accuracy(runs, output / "accuracy.png")),
        ("Throughput and guards", plot_health(runs, output / "health.png")),
    ]
    samples = plot_samples(runs, output / "samples.png")
    if samples:
        sections.append(("Ratio of positives and negatives (Table 1)", samples))
    if table := table1(runs):
        sections.append(("Table 1, in percent", table))
    missing = []
    for number, (each, label) in enumerate(zip(runs, labels(runs), strict=True), start=1):
        mark = f"_{number}" if len(runs) > 1 else ""
        curves = plot_curves(each.path, output / f"curves{mark}.png")
        sections.append((f"{label}: learning rate, losses, AP", curves))
        try:
            picture = draw_detections(each.path, output / f"detections{mark}.png", args.images)
        except (FileNotFoundError, ValueError) as error:
            missing.append(str(error))
            sections.append((f"{label}: detections", str(error)))
        else:
            sections.append((f"{label}: ground truth and detections (Figure 5)", picture))
    title = f"megdet_d2: {', '.join(labels(runs))}"
    page = write_page(output / "report.html", title, sections)
    for each in runs:
        print(summarize(each.path))
    pictures = [str(content) for _, content in sections if isinstance(content, Path)]
    print(f"Pictures: {', '.join(pictures)}\nPage:     {page}")
    if missing:
        raise ValueError("; ".join(missing))
