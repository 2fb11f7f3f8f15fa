"""Packs the unfinished trainings of a study into one file, from which another machine goes on.

    python scripts/study_state.py pack output/ablations/headline STATE.tar.xz
    python scripts/study_state.py unpack STATE.tar.xz output/ablations/headline

The file has what a resume needs: the last checkpoint, the config and the metrics of each training.
The stopped command of ``megdet ablate`` then continues, and takes finished ones from its ledger.
"""

import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

KEPT = ("config.yaml", "last_checkpoint", "metrics.json", "samples.csv")


def files_to_resume(study: Path) -> Iterator[Path]:
    """Yields the files of every training under ROW/seedN that has a checkpoint and is not finished.

    Args:
        study: the folder that ``megdet ablate --output`` names.
    """
    for folder in sorted(study.glob("*/seed*")):
        last = folder / "last_checkpoint"
        if last.is_file() and not (folder / "model_final.pth").is_file():
            yield folder / last.read_text().strip()
            yield from (folder / name for name in KEPT if (folder / name).is_file())


def pack(study: Path, state: Path) -> list[Path]:
    """Writes ``state`` and returns the files in it, relative to ``study``.

    Raises:
        FileNotFoundError: no training is unfinished.
    """
    files = [path.relative_to(study) for path in files_to_resume(study)]
    if not files:
        raise FileNotFoundError(f"{study} has no unfinished training with a checkpoint")
    with tarfile.open(state, "w:xz") as archive:
        for path in files:
            archive.add(study / path, arcname=str(path))
    return files


def unpack(state: Path, study: Path) -> list[Path]:
    """Writes the files of ``state`` under ``study`` and returns them, relative to it.

    Raises:
        FileExistsError: a training is already there; nothing is written.
    """
    with tarfile.open(state) as archive:
        files = [Path(name) for name in archive.getnames()]
        there = sorted({str(path.parent) for path in files if (study / path.parent).exists()})
        if there:
            raise FileExistsError(f"{study} already has {', '.join(there)}; move these away first")
        archive.extractall(study, filter="data")
    return files


if __name__ == "__main__":
    command, source, target = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    for written in {"pack": pack, "unpack": unpack}[command](source, target):
        print(written)
