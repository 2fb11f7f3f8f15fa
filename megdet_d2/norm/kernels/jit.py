"""A decorator for kernels, which compiles them where Triton is installed and can compile."""

import os
import shutil
import sysconfig

try:
    import triton
except ImportError:  # torch's CPU wheels do not include it
    triton = None

LOWEST_TRITON = (3, 6)
"""The oldest version that the kernels are compiled with in the tests: that of torch 2.11."""

# Sizes that a launch passes to a kernel, and the stamp.
_SIZES = {"rows", "channels", "vectors", "groups", "tiles", "splits", "processes"}
_SIZES |= {"end", "second_end", "stamp"}


def available() -> bool:
    """Returns True if a Triton that the kernels support is installed and can compile.

    Triton builds its launchers with a C compiler and Python's headers. Slim containers, and
    distributions without development packages, do not have them.
    """
    return _IS_SUPPORTED and _CAN_BUILD


def _is_supported() -> bool:
    """Returns True for ``LOWEST_TRITON`` and later."""
    if triton is None:
        return False
    numbers = triton.__version__.split(".")[:2]
    return tuple(int(number) for number in numbers) >= LOWEST_TRITON


# Computed at import, because torch.compile cannot trace calls to the file system.
_CAN_BUILD = bool(
    os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
) and os.path.isfile(os.path.join(sysconfig.get_path("include"), "Python.h"))
_IS_SUPPORTED = _is_supported()


def jit(kernel):
    """Returns the kernel for Triton to compile at its first launch."""
    # A kernel is compiled for its constants and dtypes, and then serves every size. So Triton must
    # not specialise on sizes. VECTOR holds the alignment that wide loads need.
    known = [name for name in kernel.__code__.co_varnames if name in _SIZES]
    return triton.jit(kernel, do_not_specialize=known) if available() else kernel
