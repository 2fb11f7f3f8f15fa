"""Compiles every variant of the Triton kernels for GPUs that are not here, and reads the code."""

import os
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context

import pytest
import torch

from tests.helpers.compiled_kernels import (
    TARGETS,
    Variant,
    check_code,
    compile_variant,
    registers_and_spills,
    variants,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3000),
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed"),
]


def compile_and_check(variant: Variant, target: str) -> str:
    """Returns what is wrong with the code of a variant, or an empty text."""
    try:
        compiled = compile_variant(variant, target)
        if target.startswith("sm"):
            check_code(variant, compiled)
        elif registers_and_spills(compiled)[1]:
            return f"{variant}: registers and spills {registers_and_spills(compiled)}"
    except Exception as error:
        return f"{variant}: {type(error).__name__}: {error}"
    return ""


def chosen(target: str) -> list[Variant]:
    """Returns all variants for an H100, and those of bfloat16's widest loads for the others."""
    return [
        v
        for v in variants()
        if target == "sm_90" or not v.layout or (v.dtype == torch.bfloat16 and v.vector == 8)
    ]


@pytest.mark.parametrize("target", TARGETS)
def test_every_variant_compiles_without_spills(target, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    cases = chosen(target)
    assert len(cases) > 60 and (target != "sm_90" or len(cases) > 350)
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        faults = list(filter(None, pool.map(compile_and_check, cases, len(cases) * [target])))
    assert not faults, f"{len(faults)} of {len(cases)}: " + "\n".join(faults[:5])
