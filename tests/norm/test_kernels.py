"""Compares the Triton kernels with float64 references in Triton's interpreter, which needs no GPU.

It also compiles them for a Hopper GPU. tests/norm/test_cuda.py runs them on a GPU. The interpreter
is set for a whole process at the first import of Triton, so it runs in a separate process.
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from benchmarks.offline_compiler import PASSES, Variant, compile_variant
from megdet_d2.norm import kernels
from tests.helpers.compiled_kernels import check_code
from tests.helpers.kernel_cases import (
    ACTIVATIONS,
    CASES,
    FINISH,
    INNERMOST,
    OUTERMOST,
    check_all,
    check_deviations,
    check_errors,
    check_finish,
    check_layer,
    check_moments_are_robust,
    check_odd_sizes,
    check_relu_masks_agree,
    make,
)

pytestmark = pytest.mark.skipif(
    not kernels.available(), reason="Triton is not installed, or older than the kernels support"
)


@pytest.fixture(scope="module")
def interpreter():
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        with pytest.MonkeyPatch.context() as patch:
            # Set before the process starts: it imports this file, and so Triton, first of all.
            patch.setenv("TRITON_INTERPRET", "1")
            pool.submit(torch.set_num_threads, 1).result(timeout=240)
        yield lambda check, *args: pool.submit(_in_the_interpreter, check, args).result(timeout=240)


def _in_the_interpreter(check, args) -> None:
    from triton.runtime.interpreter import InterpretedFunction

    from megdet_d2.norm.kernels import reductions, tiling

    assert isinstance(reductions.moments, InterpretedFunction)
    tiling.PROGRAMS = 8  # the interpreter takes some 20 ms for one
    check(*args)


@pytest.mark.parametrize("i", range(len(CASES)))
def test_equals_float64(interpreter, i):
    interpreter(check_all, "cpu", CASES[i], ACTIVATIONS[i % 2 :: 2])


@pytest.mark.parametrize("innermost", [False, True])
def test_moments_hold_far_from_zero(interpreter, innermost):
    interpreter(check_moments_are_robust, "cpu", innermost)


def test_odd_sizes_and_tensors_that_are_not_aligned(interpreter):
    interpreter(check_odd_sizes, "cpu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_backward_masks_where_the_forward_did(interpreter, dtype):
    interpreter(check_relu_masks_agree, "cpu", dtype)


@pytest.mark.parametrize("layout", [OUTERMOST, INNERMOST])
@pytest.mark.parametrize(("relu", "addition"), ACTIVATIONS)
@pytest.mark.parametrize("padded", [False, True])
def test_a_layer_on_the_kernels(interpreter, layout, relu, addition, padded):
    interpreter(check_layer, "cpu", layout, relu, addition, padded)


@pytest.mark.parametrize("case", FINISH, ids=str)
def test_values_per_channel_and_running_statistics(interpreter, case):
    interpreter(check_finish, "cpu", *case)


def test_deviations_from_the_mean_of_the_group(interpreter):
    interpreter(check_deviations, "cpu")


def test_errors(interpreter):
    interpreter(check_errors)


def test_the_cases_reach_every_path():
    """Checks that the cases cover one and several tiles, one and several splits, all kinds of tile,
    and loads of every width."""
    from megdet_d2.norm.kernels.tiling import tiling_of

    reductions = [tiling_of(make(case), True) for case in CASES]
    for layout in ("outermost", "innermost"):
        chosen = [
            (t, min(t.tiles, -(-8 // t.groups)))
            for t in reductions
            if t.constants["LAYOUT"] == layout
        ]
        assert any(s == 1 for _, s in chosen) and any(s > 1 for _, s in chosen)
        assert any(t.tiles > s > 1 and t.tiles % s for t, s in chosen)
        assert {t.constants["VECTOR"] for t, _ in chosen} >= {1, 2, 8}
    outermost = [t.constants for t in reductions if t.constants["LAYOUT"] == "outermost"]
    assert {(c["BLOCK_R"], c["LOAD"] > c["VECTOR"]) for c in outermost} >= {
        (4, False), (4, True), (32, True),
    }  # fmt: skip
    others = [tiling_of(make(case), False).constants for case in CASES]
    assert {c["LAYOUT"] for c in others} == {"outermost", "innermost", "flat"}
    assert {c["BLOCK_R"] for c in others if c["LAYOUT"] == "flat"} == {1, 2, 32}


# --- as far as the compiler goes; test_compile_kernels.py has all variants ------------------------


@pytest.mark.parametrize("layout", ["wide", "innermost"])
@pytest.mark.parametrize("name", PASSES)
def test_compiles_for_hopper_to_wide_loads(name, layout, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    variant = Variant(name, torch.bfloat16, layout, 8, tuple(PASSES[name][0].items()))
    check_code(variant, compile_variant(variant, "sm_90"))
