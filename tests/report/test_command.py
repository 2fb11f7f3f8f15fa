"""Tests megdet report from its words to its files."""

import pytest
from detectron2.config import get_cfg

from megdet_d2 import add_megdet_config
from megdet_d2.cli import main
from tests.helpers.runs import needs_demo_extra, write_run

pytestmark = needs_demo_extra


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


def test_nothing_is_written_to_the_run_where_another_folder_is_asked_for(run, tmp_path):
    before = sorted(run.rglob("*"))
    main(["report", str(run), "--images", "1", "--output", str(tmp_path / "page")])
    assert sorted(run.rglob("*")) == before
    assert (tmp_path / "page/curves.png").is_file() and (tmp_path / "page/report.html").is_file()


def test_a_run_without_a_test_set_has_a_page_all_the_same(tmp_path, capsys):
    folder = write_run(tmp_path / "a")
    config = folder / "config.yaml"
    cfg = get_cfg()
    add_megdet_config(cfg)
    cfg.merge_from_file(str(config))
    cfg.DATASETS.TEST = ()
    config.write_text(cfg.dump())
    main(["report", str(folder)])
    page = (folder / "report.html").read_text()
    assert "DATASETS.TEST is empty" in page and page.count("<img") == 3


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
