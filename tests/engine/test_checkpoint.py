"""Checkpoints: whole or not there, checked before they are trusted, each group's statistics."""

import contextlib
import io
import logging
import logging.handlers
import multiprocessing
import os
import re
import resource
import signal
import types
from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

import megdet_d2
from megdet_d2.engine import Trainer, prepare_config
from megdet_d2.engine.checkpoint import Checkpointer, find_damage
from megdet_d2.engine.restart import claim_run
from megdet_d2.engine.uninterrupted import when_written
from megdet_d2.norm.batch_norm import cgbn_layers
from megdet_d2.norm.running_statistics import averaged_statistics, own_statistics
from tests.helpers.coco_data import assert_says
from tests.helpers.training import config, train, write_images


class Progress(types.SimpleNamespace):
    """As much of a trainer as a checkpoint is of."""

    def state_dict(self):
        return {"iteration": self.iter}

    def load_state_dict(self, state):
        self.iter = state["iteration"]


def make(folder, iteration=0, size=50_000):
    model = nn.Sequential(megdet_d2.CrossGPUBatchNorm(3), nn.Linear(1, size))
    return Checkpointer(model, str(folder), trainer=Progress(iter=iteration))


def save(checkpointer, iteration):
    checkpointer.checkpointables["trainer"].iter = iteration
    with torch.no_grad():
        checkpointer.model[1].bias.fill_(iteration)
    checkpointer.gather()
    checkpointer.save(f"model_{iteration:07d}")
    path = Path(checkpointer.save_dir, f"model_{iteration:07d}.pth")
    os.utime(path, (iteration, iteration))
    return path


def resumed(folder):
    checkpointer = make(folder, -1)
    checkpointer.resume_or_load("", resume=True)
    return checkpointer


def test_a_stock_detectron2_loads_what_we_save_and_we_what_it_saves(tmp_path):
    ours = make(tmp_path)
    save(ours, 7)
    other = nn.Sequential(nn.BatchNorm2d(3), nn.Linear(1, 50_000))
    rest = DetectionCheckpointer(other, str(tmp_path)).resume_or_load("", resume=True)
    assert other[1].bias.eq(7).all() and rest["trainer"]["iteration"] == 7
    with torch.no_grad():
        other[1].bias.fill_(9)
    DetectionCheckpointer(other, str(tmp_path), trainer=Progress(iter=9)).save("model_0000009")
    assert resumed(tmp_path).model[1].bias.eq(9).all()


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def empty(path):
    os.truncate(path, 0)


def flip_a_bit(path):
    """In the middle of a tensor, where loading does not look."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def remove(path):
    path.unlink()


def flip_the_version(path):
    """A bit of the archive's directory: the version that is needed to read its first file."""
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02") + 6] |= 0x80
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage, said",
    [
        (truncate, "is truncated or corrupt"),
        (empty, "is truncated or corrupt"),
        (flip_a_bit, "is corrupt .checksum"),
        (flip_the_version, "is truncated or corrupt .*zip file version"),
        (remove, "is not there"),
    ],
)
def test_a_bad_checkpoint_is_named_and_the_newest_good_one_is_used(tmp_path, caplog, damage, said):
    checkpointer = make(tmp_path)
    save(checkpointer, 1)
    good = save(checkpointer, 10)
    bad = save(checkpointer, 9)  # the last saved, whatever its number
    os.utime(bad, (11, 11))
    damage(bad)
    loaded = resumed(tmp_path)
    assert loaded.model[1].bias.eq(10).all()
    assert loaded.checkpointables["trainer"].iter == 10
    warning = next(r.getMessage() for r in caplog.records if "instead" in r.getMessage())
    assert str(bad) in warning and str(good) in warning
    assert re.search(said, warning)


def test_loading_by_itself_would_not_notice_a_flipped_bit(tmp_path):
    """Why the checksums are looked at: torch does not."""
    path = save(make(tmp_path), 1)
    flip_a_bit(path)
    torch.load(path)
    assert "checksum of" in find_damage(str(path))


def test_no_good_checkpoint_is_an_error_that_names_them(tmp_path):
    checkpointer = make(tmp_path)
    for iteration in (1, 2):
        truncate(save(checkpointer, iteration))
    with pytest.raises(
        RuntimeError, match="no good checkpoint in .*model_0000002.pth is trunc.*1.pth"
    ):
        resumed(tmp_path)


def test_an_empty_last_checkpoint_file_is_no_reason_to_start_over(tmp_path):
    save(make(tmp_path), 3)
    (tmp_path / "last_checkpoint").write_text("")
    assert resumed(tmp_path).model[1].bias.eq(3).all()


def test_without_a_checkpoint_training_starts_from_the_weights(tmp_path):
    (tmp_path / "x").mkdir()
    save(make(tmp_path / "x"), 4)
    checkpointer = make(tmp_path, -1)
    checkpointer.resume_or_load(str(tmp_path / "x" / "model_0000004.pth"), resume=True)
    assert checkpointer.model[1].bias.eq(4).all()
    assert checkpointer.checkpointables["trainer"].iter == -1


def other_model(folder, change):
    """A checkpointer for another model than ``make``'s, in the same folder."""
    checkpointer = make(folder, -1)
    change(checkpointer.model)
    return Checkpointer(checkpointer.model, str(folder), trainer=Progress(iter=-1))


def test_a_checkpoint_of_other_shapes_is_not_resumed(tmp_path):
    """Detectron2 would go on with random weights, and fail or not at the optimizer's state."""
    path = save(make(tmp_path), 3)
    smaller = make(tmp_path, -1, size=40_000)
    with pytest.raises(ValueError) as error:
        smaller.resume_or_load("", resume=True)
    assert_says(
        str(error.value), f"--resume: the checkpoint {str(path)!r} is of another model",
        "1.weight is (50000, 1) there and (40000, 1) here, 1.bias is (50000,) there and",
        "set MODEL.WEIGHTS to it, and another OUTPUT_DIR",
    )  # fmt: skip
    assert smaller.checkpointables["trainer"].iter == -1
    make(tmp_path, size=40_000).resume_or_load(str(path), resume=False)  # Detectron2 warns


def test_a_checkpoint_without_a_trained_layer_is_not_resumed(tmp_path):
    save(make(tmp_path), 3)
    more = other_model(tmp_path, lambda model: model.append(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=r"config's: 2.weight is not there, 2.bias is not there\."):
        more.resume_or_load("", resume=True)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.append(nn.Linear(2, 2).requires_grad_(False)),
        lambda model: model.append(model[1]),  # shares its weights
        lambda model: model.register_buffer("new", torch.zeros(2)),
        lambda model: model.pop(1),
    ],
    ids=["frozen", "shared", "a buffer", "less"],
)
def test_what_needs_no_weights_of_the_checkpoint_resumes(tmp_path, change):
    save(make(tmp_path), 3)
    other = other_model(tmp_path, change)
    other.resume_or_load("", resume=True)
    assert other.checkpointables["trainer"].iter == 3


@contextlib.contextmanager
def files_up_to(size):
    """A limit of the system on what may be written: a write beyond it fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 1000, 150_000])
def test_a_full_disk_leaves_the_previous_checkpoint_whole(tmp_path, size):
    checkpointer = make(tmp_path)
    first = save(checkpointer, 1)
    content = first.read_bytes()
    with (
        files_up_to(size),
        pytest.raises(OSError, match="could not write .*model_0000002.pth.*room"),
    ):
        save(checkpointer, 2)
    assert first.read_bytes() == content
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model_0000001.pth"]
    assert resumed(tmp_path).model[1].bias.eq(1).all()
    # the same name again: the old one is replaced only by a whole one
    with files_up_to(size), pytest.raises(OSError):
        save(checkpointer, 1)
    assert first.read_bytes() == content
    save(checkpointer, 1)
    assert find_damage(str(first)) == ""


class Interrupted(io.FileIO):
    """A file whose writes are interrupted by a signal, once."""

    at, writes = 0, 0

    def write(self, data):
        Interrupted.writes += 1
        if Interrupted.writes == self.at:
            os.kill(os.getpid(), signal.SIGUSR1)
        return super().write(data)


@pytest.mark.parametrize("at", [1, 2, 4])
def test_a_signal_that_saves_while_the_same_file_is_saved(tmp_path, monkeypatch, at):
    """torch's writer spoilt the handler's file, or raised another error than the handler."""
    checkpointer = make(tmp_path)
    first = save(checkpointer, 1)
    second = first.with_name("model_0000002.pth")
    found = []

    def leave():
        found.append(find_damage(str(second)))
        save(checkpointer, 2)
        raise SystemExit(75)

    kinds = {"wb": Interrupted}
    paths = checkpointer.path_manager._paths
    monkeypatch.setattr(paths, "open", lambda path, mode: kinds.get(mode, open)(path, mode))
    monkeypatch.setattr(Interrupted, "at", at)
    monkeypatch.setattr(Interrupted, "writes", 0)
    before = signal.signal(signal.SIGUSR1, lambda *_: when_written(leave))
    try:
        with pytest.raises(SystemExit):
            save(checkpointer, 2)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert found == [""]  # the interrupted one was whole before
    assert find_damage(str(second)) == ""
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", first.name, second.name]
    assert resumed(tmp_path).model[1].bias.eq(2).all()


def save_until_killed(folder):
    checkpointer = make(folder)
    save(checkpointer, 1)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    with files_up_to(100_000):
        save(checkpointer, 2)


def test_killed_while_saving(tmp_path):
    """By the system itself, after so many bytes of the file."""
    child = multiprocessing.get_context("forkserver").Process(
        target=save_until_killed, args=(tmp_path,)
    )
    child.start()
    child.join(120)
    assert child.exitcode == -signal.SIGXFSZ
    checkpointer = make(tmp_path)
    assert (tmp_path / "model_0000002.pth.tmp").stat().st_size == 100_000
    assert not (tmp_path / "model_0000002.pth").exists()
    assert resumed(tmp_path).model[1].bias.eq(1).all()
    save(checkpointer, 2)
    assert sorted(os.listdir(tmp_path)) == [
        "last_checkpoint", "model_0000001.pth", "model_0000002.pth",
    ]  # fmt: skip


def resume_in_a_folder_of_its_own(rank, folder):
    """Rank 0's holds a checkpoint: as on two machines that share no folder."""
    try:
        resumed(folder if rank == 0 else folder / "other")
    except RuntimeError as error:
        return str(error)
    return None


def test_a_checkpoint_that_not_all_machines_see_is_an_error_on_all(pool2, tmp_path):
    save(make(tmp_path), 1)
    (tmp_path / "other").mkdir()
    said = pool2.run(resume_in_a_folder_of_its_own, tmp_path)
    assert all("not on the machines of ranks 1; put OUTPUT_DIR where" in error for error in said)


def resume_on_rank_0_alone(rank, folder, coco):
    cfg = config(folder, coco)
    prepare_config(cfg)
    with pytest.raises(ValueError, match="--resume is not given on ranks 1; give it on all"):
        Trainer(cfg).resume_or_load(resume=rank == 0)


def test_machines_that_are_told_different_things_stop(pool2, tmp_path):
    pool2.run(resume_on_rank_0_alone, str(tmp_path / "out"), write_images(tmp_path))


def test_a_restart_takes_up_its_own_run_and_no_older_one(tmp_path, caplog):
    folder = str(tmp_path / "run")
    assert not claim_run(["host0 1 100", "host1 1 100"], folder)
    save(make(folder), 5)
    # Restarted, on one of its machines and a new one.
    assert claim_run(["host1 1 100", "host2 7 300"], folder)
    assert make(folder).has_checkpoint() and "starts from the beginning" not in caplog.text
    # Another run, which may have failed before it came here, and is restarted now.
    assert not claim_run(["host0 9 900"], folder)
    assert Path(folder, "last_checkpoint.old").read_text() == "model_0000005.pth"
    assert not make(folder).has_checkpoint() and "starts from the beginning" in caplog.text
    assert claim_run(["host0 9 900"], folder)


# --- groups --------------------------------------------------------------------------------------


def fill(model, rank):
    for layer in cgbn_layers(model):
        layer.running_mean.fill_(rank)
        layer.running_var.fill_(rank**2)


def groups_task(rank, folder):
    checkpointer = make(folder)
    megdet_d2.set_bn_size(checkpointer.model, 2, 1)  # pairs
    fill(checkpointer.model, rank // 2)
    checkpointer.model[1].loss_normalizer = 100.0 + rank  # as RetinaNet's, of each process
    before = own_statistics(checkpointer.model)
    checkpointer.checkpointables["trainer"].iter = 6
    checkpointer.gather()
    checkpointer.save("model_0000006")
    assert all(before[k].equal(v) for k, v in own_statistics(checkpointer.model).items())
    torch.distributed.barrier()

    again = make(folder, -1)
    megdet_d2.set_bn_size(again.model, 2, 1)
    again.resume_or_load("", resume=True)
    assert again.model[1].loss_normalizer == 100.0 + rank
    assert again.model[0].running_mean.eq(rank // 2).all()
    assert again.model[0].running_var.eq((rank // 2) ** 2).all()

    regrouped = make(folder, -1)
    megdet_d2.set_bn_size(regrouped.model, 4, 1)  # now all four: the mean of the groups
    regrouped.resume_or_load("", resume=True)
    assert regrouped.model[0].running_mean.eq(0.5).all()

    with averaged_statistics(again.model):
        assert again.model[0].running_mean.eq(0.5).all()
    assert again.model[0].running_mean.eq(rank // 2).all()
    with contextlib.suppress(KeyError), averaged_statistics(again.model):
        raise KeyError
    assert again.model[0].running_mean.eq(rank // 2).all()


def test_a_checkpoint_has_the_mean_and_each_groups_own(pool4, tmp_path):
    pool4.run(groups_task, str(tmp_path))
    state = torch.load(tmp_path / "model_0000006.pth")
    assert state["model"]["0.running_mean"].eq(0.5).all()
    assert state["model"]["0.running_var"].eq(0.5).all()
    assert len(state["processes"]["statistics"]) == 2  # by group, not by process


def stale_task(rank, folder):
    checkpointer = make(folder)
    megdet_d2.set_bn_size(checkpointer.model, 1, 1)
    fill(checkpointer.model, rank + 1)
    checkpointer.gather()
    fill(checkpointer.model, rank + 10)
    checkpointer.checkpointables["trainer"].iter = 1
    said = logging.handlers.BufferingHandler(100)
    logging.getLogger("megdet_d2").addHandler(said)
    checkpointer.save("model_best")  # without gather, as a hook on rank 0 alone may
    logging.getLogger("megdet_d2").removeHandler(said)
    if rank == 0:
        state = torch.load(os.path.join(folder, "model_best.pth"))
        assert state["model"]["0.running_mean"].eq(10).all() and state["processes"] == {}
        warning = said.buffer[0].getMessage()
        assert "model_best.pth has only the running statistics of rank 0's BN group" in warning


def test_saving_on_one_rank_alone_does_not_hang(pool4, tmp_path):
    pool4.run(stale_task, str(tmp_path), timeout=30)


def test_a_bad_last_checkpoint_in_a_training(tmp_path, caplog):
    """Through the trainer, in one process."""
    coco = write_images(tmp_path)
    output = tmp_path / "run"
    first = train(0, str(output), coco, ("SOLVER.CHECKPOINT_PERIOD", 2))
    for name in ("model_final.pth", "model_0000005.pth"):
        truncate(output / name)
    second = train(0, str(output), coco, ("SOLVER.CHECKPOINT_PERIOD", 2), True)
    assert second["start"] == 4
    assert "model_final.pth is truncated" in caplog.text
    assert (second["state"], second["momentum"]) == (first["state"], first["momentum"])
    assert second["images"] == first["images"][4:]
