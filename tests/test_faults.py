"""Nothing lost, nothing let in: what is damaged, fails or is killed, and what a run makes of it."""

import os
import shutil
import signal
import zipfile

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from conftest import EVERYTHING_RANDOM
from metaformer import InputError
from metaformer.weights import read_checkpoint
from test_training import interrupt, losses, same_weights

# Checkpoints


def flip(path, at, bit=1):
    content = bytearray(path.read_bytes())
    content[at] ^= bit
    path.write_bytes(content)


def place_of(path, tensor_bytes):
    """Where the first of these bytes is in a file."""
    return path.read_bytes().index(tensor_bytes)


@pytest.fixture
def two_epochs(run):
    """A run of 3 epochs that was stopped in the third: last.pt is of that step, previous.pt of the second's end."""
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, after=8)
        folder = run(*EVERYTHING_RANDOM, "epochs=3", output="stopped", status=128 + signal.SIGTERM)
    assert [read_checkpoint(folder / name)["step"] for name in ("last.pt", "previous.pt")] == [2, 0]
    return folder


def test_a_flipped_bit_in_a_tensor_is_noticed(tmp_path):
    weights = {"a": torch.arange(1000.0), "b": torch.arange(7)}
    torch.save(weights, tmp_path / "weights.pt")
    assert all(torch.equal(value, weights[name]) for name, value in read_checkpoint(tmp_path / "weights.pt").items())
    flip(tmp_path / "weights.pt", place_of(tmp_path / "weights.pt", weights["a"].numpy().tobytes()) + 1234)
    assert not torch.equal(torch.load(tmp_path / "weights.pt")["a"], weights["a"])  # torch alone does not see it
    with pytest.raises(InputError, match=r"weights.pt is not a checkpoint or is damaged"):
        read_checkpoint(tmp_path / "weights.pt")


def test_a_compressed_file_is_no_checkpoint(tmp_path):
    """torch.save does not compress; a small file that unpacks to a large one is not read."""
    torch.save({"a": torch.zeros(10)}, tmp_path / "weights.pt")
    with (
        zipfile.ZipFile(tmp_path / "weights.pt") as given,
        zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for record in given.infolist():
            packed.writestr(record.filename, given.read(record))
    with pytest.raises(InputError, match=r"packed.pt is not a checkpoint or is damaged"):
        read_checkpoint(tmp_path / "packed.pt")


@pytest.mark.parametrize("damage", ["flipped", "cut", "missing", "another"])
def test_the_previous_checkpoint_takes_the_place_of_a_damaged_one(damage, two_epochs, run, capsys):
    whole = run(*EVERYTHING_RANDOM, "epochs=3")
    last = two_epochs / "last.pt"
    if damage == "flipped":
        flip(last, place_of(last, read_checkpoint(last)["state_dict"]["head.weight"].numpy().tobytes()))
    elif damage == "cut":
        last.write_bytes(last.read_bytes()[:1000])
    elif damage == "missing":  # killed between the two renamings
        last.unlink()
    else:
        shutil.copy(two_epochs / "best.pt", last)
    problem = {"missing": "missing", "another": "not the checkpoint of a run"}.get(damage, "damaged")
    capsys.readouterr()
    assert train.main(["stopped"]) == 0
    error = capsys.readouterr().err
    assert error == f"warning: stopped/last.pt is {problem}: stopped/previous.pt takes its place\n"
    assert same_weights(whole, two_epochs)
    assert losses(two_epochs) == losses(whole)
    for tag in ("train/loss", "val/loss"):
        events = [EventAccumulator(str(folder)).Reload().Scalars(tag) for folder in (whole, two_epochs)]
        assert [(event.step, event.value) for event in events[0]] == [(event.step, event.value) for event in events[1]]


def test_without_a_good_checkpoint_a_run_does_not_continue(two_epochs):
    for name in ("last.pt", "previous.pt"):
        flip(two_epochs / name, 5000)
    before = {file.name: file.read_bytes() for file in two_epochs.iterdir()}
    with pytest.raises(InputError, match=r"last.pt is damaged and .*previous.pt is damaged: start again with another"):
        train.main(["stopped"])
    (two_epochs / "previous.pt").unlink()
    with pytest.raises(InputError, match=r"last.pt is damaged and .*previous.pt is missing: start again with another"):
        train.main(["stopped"])
    del before["previous.pt"]
    assert {file.name: file.read_bytes() for file in two_epochs.iterdir()} == before


def test_a_damaged_checkpoint_does_not_push_out_the_good_one(two_epochs, monkeypatch):
    """Between the renamings of the first save after the fall-back the folder still has a good one."""
    flip(two_epochs / "last.pt", 5000)
    good = (two_epochs / "previous.pt").read_bytes()

    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(train.Trainer, "run", stop)
    with pytest.raises(KeyboardInterrupt):
        train.main(["stopped"])
    assert (two_epochs / "last.pt").read_bytes() == good


def test_killed_after_the_last_checkpoint_a_run_is_completed(run):
    whole = run("epochs=2")
    metrics, record = (whole / "metrics.csv").read_text(), (whole / "run.json").read_text()
    (whole / "metrics.csv").write_text("".join(metrics.splitlines(keepends=True)[:-1]))
    (whole / "run.json").write_text(record.replace('"status": "finished"', '"status": "running"'))
    (whole / "best.pt.tmp").write_bytes(b"half")
    assert train.main([str(whole)]) == 0
    assert (whole / "metrics.csv").read_text() == metrics
    assert train.is_finished(whole / "run.json")
    assert not list(whole.glob("*.tmp"))


def test_a_run_begun_before_a_setting_existed_continues(two_epochs):
    config = two_epochs / "config.yaml"
    config.write_text(
        "".join(line for line in config.read_text().splitlines(keepends=True) if "erase_count" not in line)
    )
    assert train.main(["stopped"]) == 0


def test_weights_that_are_not_finite_are_not_saved(run, tmp_path, monkeypatch):
    """Stopped by a signal right after the step that spoilt the weights, whose loss was still finite."""
    original = train.Trainer.optimizer_step

    def step(self, batches):
        original(self, batches)
        if self.epoch == 1:
            with torch.no_grad():
                self.model.stem.weight.fill_(float("inf"))
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train.Trainer, "optimizer_step", step)
    with pytest.raises(InputError, match=r"a weight was not finite at epoch 2, step 1; the last good checkpoint is"):
        run()
    state = read_checkpoint(tmp_path / "run" / "last.pt")
    assert (state["epoch"], state["step"]) == (1, 0)
