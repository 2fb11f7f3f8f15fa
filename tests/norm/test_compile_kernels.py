"""Compiles the Triton kernels for GPUs that are not here, and reads the code.

By default it compiles variants that cover every kernel, argument, dtype and kind of tile. With
MEGDET_COMPILE_ALL=1 it compiles all of them for an H100.
"""

import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from benchmarks.offline_compiler import (
    PASSES,
    TARGETS,
    Variant,
    compile_variant,
    covering,
    variants,
)
from tests.helpers.compiled_kernels import (
    affine_values,
    check_code,
    compile_and_check,
    fused_in_hardware,
)
from tests.helpers.paths import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3000),
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed"),
]
# The lowest version that the documentation promises, and the one that torch 2.11 installs.
LOWEST = "3.6.0"
WIDEST = [v for v in covering() if (v.dtype, v.layout, v.vector) == (torch.bfloat16, "wide", 8)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def chosen(target: str) -> list[Variant]:
    """Returns the variants to compile, for all but an H100 the widest loads of bfloat16."""
    if target != "sm_90":
        return WIDEST + [v for v in covering() if not v.layout]
    return list(variants() if os.environ.get("MEGDET_COMPILE_ALL") else covering())


@pytest.mark.parametrize("target", TARGETS)
def test_variants_compile_without_spills(target):
    cases = chosen(target)
    assert len(cases) > 20 and (target != "sm_90" or len(cases) > 90)
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        faults = list(filter(None, pool.map(compile_and_check, cases, len(cases) * [target])))
    assert not faults, f"{len(faults)} of {len(cases)}: " + "\n".join(faults[:5])


def test_the_cover_has_every_kernel_argument_dtype_and_layout():
    cover, every = list(covering()), list(variants())
    assert len(cover) < len(every) / 3
    for name in ("kernel", "dtype", "layout"):
        assert {getattr(v, name) for v in cover} == {getattr(v, name) for v in every}
    assert {(v.kernel, v.given) for v in cover} == {(v.kernel, v.given) for v in every}


def test_spilled_registers_are_found():
    variant = next(v for v in WIDEST if v.kernel == "input_gradient")
    check_code(variant, compile_variant(variant, "sm_90"))
    with pytest.raises(AssertionError, match="input_gradient"):
        check_code(variant, compile_variant(variant, "sm_90", maxnreg=24))


def test_narrow_loads_are_found():
    for kernel in ("moments", "normalize"):
        given = tuple(PASSES[kernel][0].items())
        narrow = compile_variant(Variant(kernel, torch.bfloat16, "not aligned", 1, given), "sm_90")
        with pytest.raises(AssertionError, match=kernel):
            check_code(Variant(kernel, torch.bfloat16, "wide", 8, given), narrow)


@pytest.mark.parametrize("fusion", [False, True])
def test_forward_and_backward_compute_y_alike(fusion):
    """A compiler that fuses, or no longer does, changes nothing: each of a thread's 16 values is
    one fused multiply-add of x - mean, in the forward and where the backward computes y again."""
    for kernel, names in (
        ("normalize", {"residual": None}),
        ("gradient_sums", {"y": None}),
        ("input_gradient", {"y": None, "dresidual": None, "valid": None}),
    ):
        given = tuple({"RELU": True, **names}.items())
        variant = Variant(kernel, torch.bfloat16, "wide", 8, given)
        compiled = compile_variant(variant, "sm_90", enable_fp_fusion=fusion)
        assert affine_values(compiled) == 16, kernel
        assert fused_in_hardware(compiled) >= 16, kernel


@pytest.fixture(scope="session")
def older_triton(pytestconfig):
    """Returns a folder with the lowest Triton, and installs it there once."""
    given = os.environ.get("MEGDET_OLDER_TRITON")
    folder = Path(given) if given else Path(pytestconfig.cache.mkdir(f"triton-{LOWEST}-numpy"))
    if not (folder / "triton").is_dir():
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder)]
        # Its interpreter fails with numpy 2.4.
        packages = [f"triton=={LOWEST}", "numpy==2.3.5"]
        result = subprocess.run([*pip, *packages], capture_output=True, text=True)
        if result.returncode:
            pytest.skip(f"Triton {LOWEST} cannot be installed: {result.stderr[-200:]}")
    return folder


@pytest.mark.parametrize(("mode", "passed"), [("compile", "compiled 4"), ("interpret", "inter")])
def test_the_lowest_triton(older_triton, mode, passed):
    env = {**os.environ, "PYTHONPATH": f"{older_triton}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    env |= {"TRITON_INTERPRET": "1"} if mode == "interpret" else {}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.helpers.older_triton", mode],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=1500,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-3000:]
    assert f"{LOWEST} {passed}" in result.stdout
