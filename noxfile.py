"""Runs the tests of what depends on torch, on several versions of Python, torch and Detectron2.

    nox                                  # all versions whose Python is here
    nox -s "tests(torch-2.6)"
    nox -s "tests(torch-2.11)" -- tests/norm/test_functional.py
    DETECTRON2=../detectron2 nox -s "tests(torch-2.10)"     # the source of another Detectron2

An environment takes some 5 GB and a few minutes, and stays in .nox/.
"""

import os
import sys
from pathlib import Path

import nox

nox.options.default_venv_backend = "venv"
nox.options.reuse_venv = "yes"

# Python, torch, torchvision. torch 2.11 brings Triton 3.6, the oldest that the kernels support.
VERSIONS = [
    ("3.10", "2.4.1", "0.19.1"),
    ("3.11", "2.6.0", "0.21.0"),
    ("3.12", "2.10.0", "0.25.0"),
    ("3.12", "2.11.0", "0.26.0"),
    ("3.14", "2.15.0", "0.29.2"),
]
# The interpreter of Triton before 3.7 converts arrays to numbers, which numpy 2.4 refuses.
OLDER_NUMPY = ["numpy<2.4"]
TESTS = [
    "tests/norm",
    "tests/schedule",
    "tests/engine/test_accumulation.py",
    "tests/engine/test_checkpoint.py",
    "tests/engine/test_ddp.py",
    "tests/engine/test_old_checkpoint.py",
    "tests/engine/test_weights_only.py",
    "tests/test_memory.py",
]
REQUIREMENTS = Path("requirements/setup.txt")
CONSTRAINTS = ("-c", "requirements/constraints.txt")


def names(torch: str) -> str:
    """Returns the name of a version in nox: torch-2.6 for 2.6.0."""
    return f"torch-{torch.rpartition('.')[0]}"


def requirements() -> list[str]:
    """Returns what the tests need beside torch: the sections of setup.txt before lint and site."""
    text = REQUIREMENTS.read_text().partition("# Lint and types")[0]
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    return [line for line in lines if line and not line.startswith("torch")]


@nox.session
@nox.parametrize(
    "python,torch,torchvision", [nox.param(*row, id=names(row[1])) for row in VERSIONS]
)
def tests(session: nox.Session, torch: str, torchvision: str) -> None:
    """Runs the tests with one version of torch."""
    numpy = [] if torch == VERSIONS[-1][1] else OLDER_NUMPY
    session.install(
        f"torch=={torch}", f"torchvision=={torchvision}", *numpy, *requirements(), "pytest-xdist",
        *CONSTRAINTS,
    )  # fmt: skip
    site = session.run_install(
        "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", silent=True
    )
    # As in the Makefile: the wheel is tagged for Python 3.10, and its extension loads there only.
    session.install(
        "--no-deps", "--target", str(site).strip(), "--upgrade", "--python-version", "3.10",
        "--implementation", "cp", "--platform", "any", "--only-binary=:all:", "--require-hashes",
        "-r", "requirements/detectron2.txt",
    )  # fmt: skip
    for extension in Path(str(site).strip(), "detectron2").glob("_C*.so"):
        extension.unlink()
    path = [str(Path.cwd())]
    if os.environ.get("DETECTRON2"):
        path.append(str(link_configs(Path(os.environ["DETECTRON2"]))))
    session.run(
        "python", "-m", "pytest", "-q", *(session.posargs or TESTS),
        env={"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def link_configs(source: Path) -> Path:
    """Returns the folder of Detectron2's source, with the link that its setup.py makes."""
    link = source / "detectron2" / "model_zoo" / "configs"
    if not link.exists():
        link.symlink_to(Path("..") / ".." / "configs")
    return source.resolve()


if __name__ == "__main__":
    sys.exit(nox.main())
