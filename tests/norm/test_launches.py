"""Counts what a layer launches on a GPU, on fake tensors, and fails at one launch more."""

import importlib.util
import json

import pytest

from megdet_d2.norm import kernels
from tests.helpers.paths import ROOT

RESULTS = ROOT / "docs/results/launches.json"

pytestmark = pytest.mark.skipif(
    not kernels.available(), reason="Triton is not installed, or older than the kernels support"
)

# Kernels, collectives and allocations, forward and backward.
EXPECTED = {
    "CGBN": ((3, 1, 5), (2, 1, 5)),
    "CGBN with ReLU": ((3, 1, 5), (2, 1, 5)),
    "CGBN with addition and ReLU": ((3, 1, 5), (2, 1, 5)),
    "CGBN, two_pass": ((4, 2, 7), (2, 1, 5)),
    "CGBN, momentum None": ((3, 1, 5), (2, 1, 5)),
    "CGBN without γ and β": ((3, 1, 5), (2, 1, 5)),
    "CGBN without running statistics": ((3, 1, 5), (2, 1, 5)),
    "CGBN, padding left out": ((3, 1, 5), (2, 1, 5)),
    "CGBN, no group": ((3, 0, 5), (2, 0, 5)),
    "CGBN, no group, addition and ReLU": ((3, 0, 5), (2, 0, 5)),
}


@pytest.fixture(scope="module")
def launches():
    spec = importlib.util.spec_from_file_location("launches", ROOT / "benchmarks/launches.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def numbers(counts):
    return tuple((c["launches"], c["collectives"], c["allocations"]) for c in counts.values())


@pytest.mark.parametrize("name", EXPECTED)
def test_a_layer_launches_no_more_than_that(launches, name):
    counts = launches.count_cgbn(**launches.variants()[name])
    assert numbers(counts) == EXPECTED[name], counts


@pytest.mark.parametrize("shape", [(2, 4096, 20, 20), (2, 1, 4, 4), (64, 8), (2, 8, 3, 4, 5)])
def test_other_shapes_launch_as_many(launches, shape):
    counts = launches.count_cgbn(shape=shape)
    assert numbers(counts) == EXPECTED["CGBN"], counts


def test_a_launch_more_is_counted(launches, monkeypatch):
    from megdet_d2.norm import functional

    slower = functional.implementations["normalize"]
    monkeypatch.setitem(
        functional.implementations, "normalize", lambda x, *args: slower(x + 0, *args)
    )
    forward, backward = numbers(launches.count_cgbn())
    assert (forward[0], backward[0]) == (4, 2)


def test_every_variant_is_here(launches):
    assert set(EXPECTED) == set(launches.variants()) - {"CGBN by ATen"}


def test_torchs_norm_launches_more(launches):
    torchs = numbers(launches.count_sync_batch_norm())
    assert [a[:2] for a in torchs] == [(7, 1), (3, 1)]
    naive = numbers(launches.count_naive(""))
    assert all(a[0] > 20 for a in naive)


def test_the_page_shows_the_committed_results():
    counts = json.loads(RESULTS.read_text())["counts"]
    page = (ROOT / "docs/cgbn.md").read_text()
    for name in ("CGBN", "CGBN, two_pass", "CGBN, no group", "SyncBatchNorm, captured"):
        cells = [f"{c['launches']} + {c['collectives']}" for c in counts[name].values()]
        assert f"| {name} | {' | '.join(cells)} |" in page, name
    for name, expected in EXPECTED.items():
        assert numbers(counts[name]) == expected, name
