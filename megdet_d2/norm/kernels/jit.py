"""A decorator for kernels, which compiles them where Triton is installed and can compile."""

import os
import shutil
import sysconfig

try:
    import triton
except ImportError:  # torch's CPU wheels do not include it
    triton = None

# Sizes that a launch passes to a kernel, and the stamp.
_SIZES = {"rows", "channels", "vectors", "groups", "tiles", "splits", "processes"}
_SIZES |= {"end", "second_end", "stamp"}


def available() -> bool:
    """Returns True if Triton is installed and can compile, as the functions of this module need.

    Triton builds its launchers with a C compiler and Python's headers. Slim containers, and
    distributions without development packages, do not have them.
    """
    return triton is not None and _CAN_BUILD


# Computed at import, because torch.compile cannot trace calls to the file system.
_CAN_BUILD = bool(
    os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
) and os.path.isfile(os.path.join(sysconfig.get_path("include"), "Python.h"))


# Computed at import, because torch.compile cannot trace calls to the file system.
_CAN_BUILD = bool(
    os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
) and os.path.isfile(os.path.join(sysconfig.get_path("include"), "Python.h"))


def jit(kernel):
    """Returns the kernel for Triton to compile at its first launch."""
    # A kernel is compiled for its constants and dtypes, and then serves every size. So Triton must
    # not specialise on sizes. VECTOR holds the alignment that wide loads need.
    known = [name for name in kernel.__code__.co_varnames if name in _SIZES]
    return triton.jit(kernel, do_not_specialize=known) if available() else kernel
