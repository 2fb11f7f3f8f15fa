"""Tests that a stopped study goes on from the file of ``scripts/study_state.py``."""

import json

import pytest

from megdet_d2.ablation.job import make_jobs
from megdet_d2.ablation.rows import read_rows
from megdet_d2.cli import main
from scripts import study_state
from tests.helpers.paths import ROOT, TINY


@pytest.mark.slow
def test_another_folder_goes_on_to_the_same_result(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    source = tmp_path / "rows.yaml"
    source.write_text(
        f"CONFIG: {TINY}\nROWS:\n"
        "  a: {MEGDET.POLICY: '', SOLVER.MAX_ITER: 4, SOLVER.CHECKPOINT_PERIOD: 2}\n"
    )
    whole, stopped, other = (tmp_path / name for name in ("whole", "stopped", "other"))
    main(["ablate", str(source), "--output", str(whole)])
    (job,) = make_jobs(read_rows(source), [1], whole)
    last = json.loads((job.folder / "metrics.json").read_text().splitlines()[-1])

    folder = stopped / "a" / "seed1"
    folder.mkdir(parents=True)
    for name in ("config.yaml", "model_0000001.pth"):
        (folder / name).write_bytes((job.folder / name).read_bytes())
    (folder / "metrics.json").write_text("")  # the first line is of the end
    (folder / "last_checkpoint").write_text("model_0000001.pth")
    state = tmp_path / "state.tar.xz"
    packed = study_state.pack(stopped, state)
    assert study_state.unpack(state, other) == packed
    main(["ablate", str(source), "--output", str(other)])
    resumed = other / "a" / "seed1"
    assert "Starting training from iteration 2" in (resumed / "log.txt").read_text()
    again = json.loads((resumed / "metrics.json").read_text().splitlines()[-1])
    assert again["bbox/AP"] == last["bbox/AP"]
    with pytest.raises(FileExistsError, match="a/seed1"):
        study_state.unpack(state, other)


def test_finished_trainings_are_left_out(tmp_path):
    done = tmp_path / "a" / "seed1"
    done.mkdir(parents=True)
    (done / "last_checkpoint").write_text("model_final.pth")
    (done / "model_final.pth").write_bytes(b"weights")
    with pytest.raises(FileNotFoundError, match="no unfinished training"):
        study_state.pack(tmp_path, tmp_path / "state.tar.xz")
