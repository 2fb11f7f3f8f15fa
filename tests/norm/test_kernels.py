"""Compares the Triton kernels with float64 references in Triton's interpreter, which needs no GPU.

It also compiles them for a Hopper GPU. tests/norm/test_cuda.py runs them on a GPU. The interpreter
is set for a whole process at the first import of Triton, so it runs in a separate process.
"""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec

import pytest
import torch

from tests.helpers.kernel_cases import (
    ACTIVATIONS,
    CASES,
    INNERMOST,
    OUTERMOST,
    check_all,
    check_errors,
    check_layer,
    check_moments_are_robust,
    check_relu_masks_agree,
    make,
)

# Not importorskip: the interpreter's process imports this file before it asks for interpretation.
pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


def _interpret() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def interpreter():
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=_interpret) as pool:
        yield lambda check, *args: pool.submit(_in_the_interpreter, check, args).result(timeout=240)


def _in_the_interpreter(check, args) -> None:
    from triton.runtime.interpreter import InterpretedFunction

    from megdet_d2.norm import kernels

    assert isinstance(kernels._moments, InterpretedFunction)
    kernels.PROGRAMS = 8  # the interpreter takes some 20 ms for one
    check(*args)


@pytest.mark.parametrize("i", range(len(CASES)))
def test_equals_float64(interpreter, i):
    interpreter(check_all, "cpu", CASES[i], ACTIVATIONS[i % 2 :: 2])


@pytest.mark.parametrize("innermost", [False, True])
def test_moments_hold_far_from_zero(interpreter, innermost):
    interpreter(check_moments_are_robust, "cpu", innermost)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_backward_masks_where_the_forward_did(interpreter, dtype):
    interpreter(check_relu_masks_agree, "cpu", dtype)


@pytest.mark.parametrize("layout", [OUTERMOST, INNERMOST])
@pytest.mark.parametrize(("relu", "addition"), ACTIVATIONS)
@pytest.mark.parametrize("padded", [False, True])
def test_a_layer_on_the_kernels(interpreter, layout, relu, addition, padded):
    interpreter(check_layer, "cpu", layout, relu, addition, padded)


def test_errors(interpreter):
    interpreter(check_errors)


def test_the_cases_reach_every_path():
    """Checks that the cases cover one and several tiles, one and several splits, both tiles, both
    layouts, and loads of every width."""
    from megdet_d2.norm import kernels

    tilings = [kernels._tiling(make(case)) for case in CASES]
    splits = [min(t.tiles, -(-8 // t.groups)) for t in tilings]
    for innermost in (False, True):
        chosen = [
            (t, s)
            for t, s in zip(tilings, splits, strict=True)
            if t.constants["INNERMOST"] == innermost
        ]
        assert any(s == 1 for _, s in chosen) and any(s > 1 for _, s in chosen)
        assert any(t.tiles > s > 1 and t.tiles % s for t, s in chosen)
        assert {t.constants["VECTOR"] for t, _ in chosen} >= {1, 2, 8}
    assert {t.constants["BLOCK_R"] for t in tilings if not t.constants["INNERMOST"]} >= {1, 32}


# --- as far as the compiler goes -----------------------------------------------------------------

POINTERS = {
    "_moments": "partials x",
    "_gradient_sums": "partials dy x y mean invstd",
    "_normalize": "y x residual mean scale bias",
    "_input_gradient": "dx dresidual dy x mean invstd scale bias mean_dy mean_dy_xhat",
}
PER_CHANNEL = "partials mean invstd scale bias mean_dy mean_dy_xhat".split()
ABSENT = {"_gradient_sums": ["scale", "bias"], "_input_gradient": ["y"]}


@pytest.mark.parametrize("layout", ["outermost", "innermost"])
@pytest.mark.parametrize("name", POINTERS)
def test_compiles_for_hopper_to_wide_loads(name, layout, tmp_path, monkeypatch):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megdet_d2.norm import kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    x = torch.empty(2, 50, 84, 64, dtype=torch.bfloat16).movedim(-1, 1)
    tiling = kernels._tiling(x if layout == "innermost" else x.contiguous())
    constants = {"RELU": True, "STAGES": kernels.STAGES, **tiling.constants}
    constants |= dict.fromkeys(ABSENT.get(name, []))
    kernel = getattr(kernels, name)
    signature, alignment = {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in POINTERS[name].split():
            signature[argument] = "*fp32" if argument in PER_CHANNEL else "*bf16"
            alignment[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[argument] = "i32"
    constants = {
        (i,): constants[argument]
        for i, argument in enumerate(kernel.arg_names)
        if argument in constants
    }
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, alignment),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": kernels.NUM_WARPS},
    )
    ptx = compiled.asm["ptx"]
    assert compiled.asm["cubin"]
    # bfloat16 moves 16 bytes at a time, or not at all, or by asynchronous copies of 16 bytes.
    assert "ld.global.v4.b32" in ptx or "cp.async.cg.shared.global" in ptx
    assert not [line for line in ptx.splitlines() if "global" in line and ".b16 " in line]
    if "partials" not in POINTERS[name]:
        assert "st.global.v4.b32" in ptx
