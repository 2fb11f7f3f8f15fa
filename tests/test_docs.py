"""What README and docs name is there: functions, config keys, files, make's targets."""

import csv
import functools
import importlib
import json
import re
import statistics

import pytest
from detectron2.config import get_cfg
from PIL import Image

from megdet_d2 import add_megdet_config
from megdet_d2.ablation.ledger import without_folders
from scripts import config_page, study_pages
from tests.helpers.paths import ROOT
from tests.helpers.runs import write_run

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
SECTIONS = "MODEL|MEGDET|SOLVER|TEST|INPUT|DATASETS|DATALOADER"
FOLDERS = "configs|tests|benchmarks|docs|megdet_d2"
MODULES = "ablation|data|engine|ensemble|gradient_noise|modeling|norm|planner|report|schedule"


def found(pattern, page):
    return sorted(set(re.findall(pattern, page.read_text())))


def resolve(name):
    """The object of a dotted name, a module or what is in one."""
    module, attributes = name, []
    while True:
        try:
            thing = importlib.import_module(module)
            break
        except ModuleNotFoundError:
            module, _, attribute = module.rpartition(".")
            attributes.insert(0, attribute)
    return functools.reduce(getattr, attributes, thing)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_names_is_there(page):
    for name in found(r"(?<!ops\.)\bmegdet_d2(?:\.\w+)+", page):
        resolve(name)

    cfg = get_cfg()
    add_megdet_config(cfg)
    for key in found(rf"\b(?:{SECTIONS})(?:\.[A-Z][A-Z0-9_]+)+\b(?!\*)", page):
        functools.reduce(getattr, key.split("."), cfg)

    # A leaf of the text's own making has no folder below these: configs/c.yaml.
    files = found(rf"\b(?:{FOLDERS})/(?:[\w.-]+/)+[\w.-]+\.(?:py|yaml|md|sbatch|csv|json)\b", page)
    files += [f"megdet_d2/{name}" for name in found(rf"(?<!/)\b(?:{MODULES})/\w+\.py\b", page)]
    assert not [name for name in files if not (ROOT / name).is_file()]

    links = [link for link in found(r"\]\(([^)#]+)", page) if "://" not in link]
    assert not [link for link in links if not (page.parent / link).exists()]

    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(found(r"`make ([a-z-]+)", page)) <= targets


def test_the_keys_page_has_the_comments_of_config_py():
    page = (ROOT / "docs/config.md").read_text()
    source = (ROOT / "megdet_d2/config.py").read_text()
    assert page == config_page.render(page, source), "run  python scripts/config_page.py"
    cfg = get_cfg()
    add_megdet_config(cfg)
    for part in ("MODEL.CGBN", "MODEL.SUBLINEAR", "MODEL.OHEM", "MEGDET", "DATASETS.DIGITS"):
        for key in functools.reduce(getattr, part.split("."), cfg):
            assert f"`{part}.{key}" in page


def test_a_comment_describes_the_keys_below_it():
    source = '''
def add_megdet_config(cfg):
    """Adds keys."""
    if "A" in cfg:
        return
    # --- One thing: read by X|Y. See MODEL.MASK_ON
    # for more -----
    cfg.A = CN()
    # Both are
    # *counted*.
    cfg.A.LOW = 0
    cfg.A.HIGH = (1, 2)
    cfg.A.PLAIN = CN()
    # A sentence.
    cfg.A.LAST = "x"
    # More in docs/memory.md
    cfg.A.B = CN()
    # Two.
    cfg.A.B.LAST = 2
'''
    assert config_page.tables(source) == (
        "\n## One thing: read by X\\|Y\n\nSee `MODEL.MASK_ON` for more.\n\n"
        "| key | default | meaning |\n|---|---|---|\n"
        "| `A.LOW`<br>`A.HIGH` | `0`<br>`(1, 2)` | Both are \\*counted\\*. |\n"
        "| `A.LAST` | `'x'` | A sentence. |\n\nMore in [memory](memory.md).\n\n"
        "| key | default | meaning |\n|---|---|---|\n| `A.B.LAST` | `2` | Two. |"
    )


def test_readme_fits_its_limit_and_its_pictures_are_small():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130
    for picture in (ROOT / "docs/assets").iterdir():
        assert picture.stat().st_size < 150_000


@pytest.mark.parametrize("path", study_pages.PAGES, ids=lambda path: path.stem)
def test_the_tables_of_studies_are_written_from_the_committed_files(path):
    assert path.read_text() == study_pages.render(path), "run  python scripts/study_pages.py"


def test_the_headline_plot_and_tables_have_all_of_its_files(tmp_path):
    pytest.importorskip("matplotlib", reason="the plot needs the demo extra")
    known = {path.name for path in study_pages.FILES.glob("headline_*.csv")}
    assert known <= {*study_pages.STUDIES, "headline_loss.csv"}
    with Image.open(study_pages.draw(tmp_path / "plot.png")) as drawn:
        with Image.open(study_pages.PLOT) as committed:
            assert drawn.size == committed.size


def test_rates_of_optimizers_have_ap_and_failures():
    def line(row, ap):
        return {"row": row, "seed": "101", "ap": ap, "failed": str(int(ap == ""))}

    lines = [line("sgd_lr_0.32", "61"), line("sgd_lr_0.16", "60"), line("sgd_lr_0.32", "")]
    table = study_pages.rate_table([*lines, line("muon_lr_0.001", "55.5")]).splitlines()
    assert table[2] == "| sgd | 0.16: 60.00 | 0.32: 61.00, 1 of 2 failed |"
    assert table[3] == "| muon | 0.001: 55.50 |"


def test_every_list_of_rows_is_described():
    page = (ROOT / "docs/experiments.md").read_text()
    for path in (ROOT / "configs/ablations").glob("*_*.yaml"):
        assert f"`{path.name}`" in page, path.name


@pytest.mark.parametrize("path", sorted(study_pages.FILES.glob("*.csv")), ids=lambda p: p.stem)
def test_results_have_no_folders_of_a_machine(path):
    text = path.read_text()
    assert without_folders(text) == text


def test_readme_has_the_gaps_of_the_headline():
    readme = (ROOT / "README.md").read_text()
    # 1,496, 3,003 and 5,071 iterations of 128, and the mini-batches between.
    for pair in (*study_pages.PAIRS[3:], *study_pages.BETWEEN):
        gaps = study_pages.paired_gaps(pair.read(), pair.large, pair.small)
        gap = study_pages.spread(gaps, "+")
        assert gap in readme, gap


def test_the_headline_pairs_seeds_and_tests_equality():
    def line(row, seed, ap):
        return {"row": row, "seed": str(seed), "ap": str(ap), "failed": str(int(ap == "")),
                "batch": "8", "bn_size": "8", "lr": "0.02", "iterations": "3003"}  # fmt: skip

    pair = study_pages.SHORTER
    lines = [line(pair.small, s, 70 + s) for s in (1, 2, 3, 4)]
    lines += [line(pair.large, s, 70.1 + s + 0.01 * s) for s in (3, 1, 2)]
    lines += [line(pair.large, 5, "")]
    gaps = study_pages.paired_gaps(lines, pair.large, pair.small)
    assert gaps == pytest.approx([0.11, 0.12, 0.13])
    assert study_pages.pair_seeds(lines, pair) == ["1", "2", "3"]
    last = study_pages.study_table(lines, lambda row: pair.small).splitlines()[-1]
    assert "| 4 | 1 (5 to 70 %) | 72.12 ± 1.01 | +0.12 ± 0.01 | +0.10 to +0.14 | yes |" in last
    assert "equal within 0.5" in study_pages.verdict(lines, pair)
    lines[-2]["ap"] = "80"
    assert "not shown equal within 0.5" in study_pages.verdict(lines, pair)
    for number, worse in enumerate(lines[-4:-1]):
        worse["ap"] = str(60 + int(worse["seed"]) + 0.01 * number)
    assert "a gap above 0.5 AP" in study_pages.verdict(lines, pair)


def test_tests_that_a_page_names_are_there():
    page = (ROOT / "docs/reliability.md").read_text()
    sources = [path.read_text() for path in (ROOT / "tests").rglob("test_*.py")]
    for name in re.findall(r"`(?:test_\w+\.py::)?(test_\w+)(?:\.\.\.|\[\w+\])?`", page):
        assert any(f"def {name}" in source for source in sources), name
    for name in re.findall(r"`(?:tests/[\w/]+/)?(test_\w+\.py)", page):
        assert list((ROOT / "tests").rglob(name)), name


@pytest.mark.parametrize(
    ("file", "row"),
    [
        ("bccd", "1_b16_frozen"),
        ("bccd", "06_b16_bn16"),
        ("bccd", "10_b64_bn16"),
        ("bccd", "12_b128_bn16"),
        ("bn_size", "4_b64_bn16"),
    ],
)
def test_readme_has_the_figures_of_the_committed_results(file, row):
    with open(ROOT / f"docs/results/experiments/{file}.csv", newline="") as lines:
        aps = [float(line["ap"]) for line in csv.DictReader(lines) if line["row"] == row]
    assert len(aps) == 3
    figure = f"{statistics.mean(aps):.1f} ± {statistics.stdev(aps):.1f}"
    assert figure in (ROOT / "README.md").read_text()


def test_training_losses_are_means_over_epochs(tmp_path):
    folder = write_run(tmp_path / study_pages.SHORTER.small / "seed3", batch_size=8)
    write_run(tmp_path / study_pages.SHORTER.large / "seed3", batch_size=8)
    (tmp_path / study_pages.SHORTER.large / "seed3/metrics.json").write_text("")  # not finished
    rows = [{"iteration": i, **dict.fromkeys(study_pages.LOSSES, i)} for i in range(110)]
    rows.append({"iteration": 110, "bbox/AP": 30.0})
    (folder / "metrics.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = study_pages.read_losses(tmp_path)
    assert {key[:2] for key in found} == {(study_pages.SHORTER.small, "3")} and len(found) == 11
    assert found[study_pages.SHORTER.small, "3", "11"] == ["104.5000"] * 5  # 100 to 109
