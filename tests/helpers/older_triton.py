"""The kernels on an older Triton, which comes first on PYTHONPATH: compiled, or interpreted.

python -m tests.helpers.older_triton compile
TRITON_INTERPRET=1 python -m tests.helpers.older_triton interpret
"""

import sys

import torch
import triton

from benchmarks.offline_compiler import covering
from tests.helpers.compiled_kernels import compile_and_check
from tests.helpers.kernel_cases import ACTIVATIONS, CASES, FINISH, check_all, check_finish


def main() -> None:
    """Prints the version and what has passed; an error ends it."""
    torch.set_num_threads(1)
    if sys.argv[1] == "compile":
        # Every argument once: with the widest loads of bfloat16, and the values per channel.
        chosen = [
            v
            for v in covering()
            if not v.layout or (v.dtype == torch.bfloat16 and v.layout == "wide" and v.vector == 8)
        ]
        for target in ("sm_90", "gfx942"):
            for variant in chosen:
                fault = compile_and_check(variant, target)
                assert not fault, fault
        print(triton.__version__, "compiled", 2 * len(chosen))
    else:
        from megdet_d2.norm.kernels import tiling

        tiling.PROGRAMS = 8
        for case in (CASES[2], CASES[3], CASES[8]):
            check_all("cpu", case, ACTIVATIONS[-1:])
        check_finish("cpu", *FINISH[0])
        print(triton.__version__, "interpreted 4")


if __name__ == "__main__":
    main()
