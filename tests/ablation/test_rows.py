"""Tests the rows of an ablation: how they are read, and what is refused."""

import pytest

from megdet_d2.ablation.rows import read_rows
from tests.helpers.ablation import TABLE3
from tests.helpers.paths import ROOT


def test_a_folder_is_its_configs_in_order():
    names = [row.name for row in read_rows(TABLE3)]
    assert names == sorted(names) and len(names) == 20 and not any("Base" in n for n in names)


def test_a_list_overrides_one_config(listed):
    linear, half, none = read_rows(listed)
    assert linear.cfg.SOLVER.BASE_LR == pytest.approx(0.32) and linear.paper_ap == 37.1
    assert half.cfg.SOLVER.BASE_LR == pytest.approx(0.16) and half.paper_ap == 36.0
    assert none.cfg.SOLVER.BASE_LR == pytest.approx(0.02) and none.paper_ap is None
    assert (linear.batch_size, linear.bn_size, linear.processes) == (256, 16, 128)
    assert half.opts[:2] == ("MEGDET.LR_FACTOR", "0.5")


def test_overrides_of_the_command_line_come_last(listed):
    for row in read_rows(listed, ["MEGDET.LR_FACTOR", "2.0"]):
        assert row.cfg.MEGDET.LR_FACTOR == 2


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("- 1\n", "not a list of rows"),
        ("CONFIG: nothing.yaml\nROWS: {a: {}}\n", "row a of .* there is no config"),
        ("CONFIG: @\nROWS: {a: {}\n", "is not YAML"),
        ("CONFIG: @\nROWS: {a: {MEGDET.NO: 1}}\n", "row a of .*MEGDET.NO"),
        ("CONFIG: @\nROWS: {a: {MODEL.CGBN.BN_SIZE: 3}}\n", "row a of .*BN_SIZE is 3"),
        ("CONFIG: @\nROWS: {a: {MEGDET.ABLATION.GPUS: 3}}\n", "row a of .* share evenly"),
        ("CONFIG: @\nROWS: {}\n", "has no row"),
    ],
)
def test_a_row_that_cannot_be_trained_is_refused_by_name(tmp_path, text, match):
    path = tmp_path / "rows.yaml"
    path.write_text(text.replace("@", str(ROOT / TABLE3 / "06_b16_bn16.yaml")))
    with pytest.raises(ValueError, match=match):
        read_rows(path)


def test_an_empty_or_missing_source_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no row"):
        read_rows(tmp_path)
    with pytest.raises(FileNotFoundError, match="neither a folder"):
        read_rows(tmp_path / "nowhere")


def test_a_group_may_span_machines(tmp_path):
    path = tmp_path / "rows.yaml"
    rows = "{a: {MODEL.CGBN.BN_SIZE: 32, MODEL.CGBN.CROSS_MACHINE: true}}"
    path.write_text(f"CONFIG: {ROOT / TABLE3 / '14_b256_bn16.yaml'}\nROWS: {rows}\n")
    assert read_rows(path)[0].bn_size == 32
    path.write_text(path.read_text().replace("true", "false"))
    with pytest.raises(ValueError, match="row a of .*BN_SIZE is 32"):
        read_rows(path)


@pytest.mark.parametrize("rows", ["", "[a, b]", "{a: half}"])
def test_a_list_that_names_no_keys_is_refused(rows, tmp_path):
    path = tmp_path / "rows.yaml"
    path.write_text(f"CONFIG: x.yaml\nROWS: {rows}\n")
    with pytest.raises(ValueError, match=f"ROWS of {path} is .*; give a name to each row"):
        read_rows(path)
