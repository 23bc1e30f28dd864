"""Nothing lost, nothing let in: what is damaged, fails or is killed, and what a run makes of it."""

import importlib
import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchvision.datasets.folder import IMG_EXTENSIONS, ImageFolder

from conftest import EVERYTHING_RANDOM, TINY, pack, trained
from metaformer import InputError, provenance, records
from metaformer.analysis import outputs
from metaformer.analysis.measured import Measured
from metaformer.analysis.studies import faults
from metaformer.errors import MachineError, run_command
from metaformer.provenance import write_file, write_torch
from metaformer.training import batches, loader, runlog
from metaformer.training import engine as train
from metaformer.training.config import load_config
from metaformer.training.data import open_split
from metaformer.weights import read_checkpoint
from pairs import Script
from test_training import interrupt, losses, same_weights, validated

# Checkpoints


def flip(path, at, bit=1):
    content = bytearray(path.read_bytes())
    content[at] ^= bit
    path.write_bytes(content)


def place_of(path, tensor_bytes):
    """Where the first of these bytes is in a file."""
    return path.read_bytes().index(tensor_bytes)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, pictures):
    """A run of 3 epochs that was stopped in the third: last.pt is of that step, previous.pt of the second's end."""
    folder = tmp_path_factory.mktemp("stopped")
    (folder / "empty.yaml").write_text("")
    settings = (f"data_dir={pictures}", f"output={folder / 'run'}", *TINY, *EVERYTHING_RANDOM, "epochs=3")
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, after=8)
        assert trained(str(folder / "empty.yaml"), *settings) == 128 + signal.SIGTERM
    assert [read_checkpoint(folder / "run" / name)["step"] for name in ("last.pt", "previous.pt")] == [2, 0]
    return folder / "run"


@pytest.fixture
def two_epochs(stopped, tmp_path, monkeypatch):
    """A copy of that run to spoil, ``stopped`` in the current folder."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(stopped, tmp_path / "stopped")


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
def test_the_previous_checkpoint_takes_the_place_of_a_damaged_one(damage, two_epochs, shared_run, capsys):
    whole = shared_run(*EVERYTHING_RANDOM, "epochs=3")
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
    assert trained("stopped") == 0
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
        trained("stopped")
    (two_epochs / "previous.pt").unlink()
    with pytest.raises(InputError, match=r"last.pt is damaged and .*previous.pt is missing: start again with another"):
        trained("stopped")
    del before["previous.pt"]
    assert {file.name: file.read_bytes() for file in two_epochs.iterdir()} == before


def test_a_damaged_checkpoint_does_not_push_out_the_good_one(two_epochs, monkeypatch):
    """Between the renamings of the first save after the fall-back the folder still has a good one."""
    flip(two_epochs / "last.pt", 5000)
    good = (two_epochs / "previous.pt").read_bytes()

    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(train.Trainer, "finish", stop)
    with pytest.raises(KeyboardInterrupt):
        trained("stopped")
    assert (two_epochs / "last.pt").read_bytes() == good


def test_killed_after_the_last_checkpoint_a_run_is_completed(shared_run, tmp_path):
    whole = shutil.copytree(shared_run(), tmp_path / "whole")
    metrics, record = (whole / "metrics.csv").read_text(), (whole / "run.json").read_text()
    (whole / "metrics.csv").write_text("".join(metrics.splitlines(keepends=True)[:-1]))
    (whole / "run.json").write_text(record.replace('"status": "finished"', '"status": "running"'))
    (whole / "best.pt.tmp").write_bytes(b"half")
    assert trained(str(whole)) == 0
    assert (whole / "metrics.csv").read_text() == metrics
    assert json.loads((whole / "run.json").read_text())["status"] == "finished"
    assert not list(whole.glob("*.tmp"))


def test_stopped_before_its_first_checkpoint_a_run_begins_with_the_settings_now_given(run, tmp_path, monkeypatch):
    def fail(*_):
        raise InputError("cannot write")

    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "save", fail)
        with pytest.raises(InputError, match="cannot write"):
            run("epochs=1")
    folder = run("epochs=1", "lr=0.001", "--resume")
    assert load_config([str(folder)]).lr == 0.001
    assert read_checkpoint(folder / "last.pt")["config"]["lr"] == 0.001


def test_a_run_begun_before_a_setting_existed_continues(two_epochs):
    config = two_epochs / "config.yaml"
    config.write_text(
        "".join(line for line in config.read_text().splitlines(keepends=True) if "erase_count" not in line)
    )
    assert trained("stopped") == 0


def test_weights_that_are_not_finite_are_not_saved(run, tmp_path, monkeypatch):
    """Stopped by a signal right after the step that spoilt the weights, whose loss was still finite."""
    original = train.Trainer.optimizer_step

    def step(self, batches):
        original(self, batches)
        if self.progress.epoch == 1:
            with torch.no_grad():
                self.model.stem.weight.fill_(float("inf"))
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train.Trainer, "optimizer_step", step)
    with pytest.raises(InputError, match=r"a weight was not finite at epoch 2, step 1; the last good checkpoint is"):
        run()
    state = read_checkpoint(tmp_path / "run" / "last.pt")
    assert (state["epoch"], state["step"]) == (1, 0)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "diverged"


def test_events_that_cannot_be_begun_end_in_a_sentence(run, monkeypatch):
    def begin(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(runlog.RecordWriter, "write", begin)
    with pytest.raises(InputError, match=r"^cannot write run: Permission denied$"):
        run()


# Pictures

GREY = (np.arange(40 * 50, dtype=np.uint32).reshape(40, 50) * 30).astype(np.uint16)
"""16 bits, most of them above 255."""


def pixels(
    folder, name: str, content: Image.Image | bytes, dataset: str = "", **options
) -> np.ndarray | batches.Unreadable:
    """What the loader makes of a picture before the transforms, as the only one of its class."""
    (folder / "train" / "a").mkdir(parents=True)
    file = folder / "train" / "a" / name
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        content.save(file, **options)
    dataset = open_split(load_config([f"dataset={dataset}", f"data_dir={folder}"]), "train", workers=0)
    result = batches.Images(dataset, np.asarray, seed=0)[0, 0]
    return result if isinstance(result, batches.Unreadable) else result[0]


def encoded(picture: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def drawn(mode: str = "RGB", size: tuple[int, int] = (50, 40)) -> Image.Image:
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    return coarse.resize(size, Image.BICUBIC).convert(mode)


@pytest.mark.parametrize("dataset", ["", "torch/image_folder"])
def test_16_bits_keep_their_greys(dataset, tmp_path):
    found = pixels(tmp_path, "grey.png", Image.fromarray(GREY), dataset)
    assert np.array_equal(found, np.repeat((GREY >> 8).astype(np.uint8)[..., None], 3, axis=2))


@pytest.mark.parametrize("kind", ["wds", "WDS"])
def test_16_bits_keep_their_greys_in_a_stream(kind, tmp_path):
    (tmp_path / "data/train/a").mkdir(parents=True)
    Image.fromarray(GREY).save(tmp_path / "data/train/a/grey.png")
    shards = pack(tmp_path / "wds", tmp_path / "data", train=1)
    dataset = open_split(load_config([f"dataset={kind}/local", f"data_dir={shards}"]), "train", workers=0)
    ((found, label),) = batches.Stream(dataset, np.asarray)
    assert np.array_equal(found, np.repeat((GREY >> 8).astype(np.uint8)[..., None], 3, axis=2))
    assert label == 0


@pytest.mark.parametrize("mode", ["P", "L", "LA", "RGBA", "1"])
def test_other_modes_become_rgb(mode, tmp_path):
    picture = drawn(mode)
    assert np.array_equal(pixels(tmp_path, "picture.png", picture), np.asarray(picture.convert("RGB")))


def test_cmyk_is_the_picture_and_not_its_negative(tmp_path):
    found = pixels(tmp_path, "picture.jpg", drawn("CMYK"), quality=95)
    assert np.abs(found.astype(int) - np.asarray(drawn())).mean() < 5


def test_the_first_picture_of_an_animation_is_used(tmp_path):
    first, second = drawn(), Image.new("RGB", (50, 40), "red")
    found = pixels(tmp_path, "moves.png", first, save_all=True, append_images=[second])
    assert np.array_equal(found, np.asarray(first))


def test_pictures_of_all_endings_are_found_that_torchvision_knows(tmp_path):
    for label in "ab":
        (tmp_path / "train" / label).mkdir(parents=True)
        for suffix in IMG_EXTENSIONS:
            drawn("L").save(tmp_path / "train" / label / f"picture{suffix}")
    dataset = open_split(load_config([f"data_dir={tmp_path}"]), "train", workers=0)
    assert len(dataset) == len(ImageFolder(tmp_path / "train")) == 2 * len(IMG_EXTENSIONS)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "BMP"])
def test_the_content_counts_and_not_the_ending(kind, tmp_path):
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encoded(drawn(), kind, **options)
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    assert np.array_equal(pixels(tmp_path, "picture.jpg", content), expected)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "UnidentifiedImageError"),
        (b"no picture", "UnidentifiedImageError"),
        (encoded(drawn(), "JPEG")[:-100], "OSError: image file is truncated"),
        (encoded(drawn(), "PNG")[:500], "OSError: .*truncated"),
        (encoded(drawn("F"), "TIFF"), "ValueError: pixels of mode F, in which the value of white is not defined"),
        (encoded(Image.fromarray(np.full((4, 5), 70000, dtype=np.int32)), "TIFF"), "ValueError: pixels of mode I, "),
        (encoded(Image.new("1", (14000, 14000)), "PNG"), "DecompressionBombError"),
    ],
)
@pytest.mark.parametrize("dataset", ["", "torch/image_folder"])
def test_what_cannot_be_read_is_named(dataset, content, reason, tmp_path):
    found = pixels(tmp_path, "picture.png", content, dataset)
    assert found.name == str(tmp_path / "train" / "a" / "picture.png")
    assert re.match(reason, found.reason)


NAMES = ["with space.png", "100%s.png", "quote'\".png", "-rf.png", "ünï 図.png", "two\nlines.png", "x" * 251 + ".png",
         os.fsdecode(b"not-utf8-\xff.png"), "UPPER.PNG", ".hidden.png", "$(date).png", "a.b.jpg.png"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_odd_file_names(name, tmp_path):
    assert np.array_equal(pixels(tmp_path / "good", name, encoded(drawn(), "PNG")), np.asarray(drawn()))
    found = pixels(tmp_path / "bad", name, b"")
    assert found.name.isprintable()
    assert name in found.name or repr(name)[1:-1] in found.name
    assert (found.name + found.reason).encode()  # it can be printed


def copied(pictures, root):
    """A data folder of one's own to spoil."""
    shutil.copytree(pictures, root)
    return root


def test_pictures_of_any_size_are_used(run, pictures, tmp_path):
    root = copied(pictures, tmp_path / "data")
    for split in ("train", "val"):
        drawn(size=(1, 1)).save(root / split / "a" / "000.png")
        Image.new("RGB", (1, 4000), "red").save(root / split / "b" / "000.png")
        Image.new("RGB", (5000, 4000), "blue").save(root / split / "c" / "000.png")
    folder = run(f"data_dir={root}", *EVERYTHING_RANDOM, "epochs=1")
    assert json.loads((folder / "run.json").read_text())["skipped"] == {"training": 0, "validation": 0}


def spoilt(pictures, root):
    copied(pictures, root)
    for name in ("train/a/001.png", "train/c/003.png", "val/b/002.png"):
        (root / name).write_bytes((root / name).read_bytes()[:100])
    (root / "train/b/000.png").write_bytes(b"")
    return root


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_pictures_are_left_out_named_once_and_counted(workers, run, pictures, tmp_path, monkeypatch, capsys):
    root = spoilt(pictures, tmp_path / "data")
    sizes = []
    original = train.Trainer.optimizer_step

    def step(self, batches):
        original(self, (sizes.append(len(labels)) or (images, labels) for images, labels in batches))

    monkeypatch.setattr(train.Trainer, "optimizer_step", step)
    settings = [f"data_dir={root}", "bad_pictures=skip", f"workers={workers}"]
    folder = run(*settings)
    printed = capsys.readouterr().out
    for split, name in (("training", "train/a/001"), ("training", "train/b/000"), ("validation", "val/b/002")):
        assert len(re.findall(rf"^skipped the {split} picture {root}/{name}.png \(\w+Error: ", printed, re.M)) == 1
    assert "skipped   3 training and 1 validation pictures" in printed
    assert "% of 8 held-out images" in printed
    assert json.loads((folder / "run.json").read_text())["skipped"] == {"training": 3, "validation": 1}
    assert len(sizes) == 12
    assert sum(sizes) == 2 * (24 - 3)

    # As if they were not there: the same pictures count, and nothing else.
    (root / "val/b/002.png").unlink()
    metrics = validated([str(folder), "bad_pictures=stop", f"data_dir={root}"], tmp_path / "without.json")["metrics"]
    (root / "val/b/002.png").write_bytes(b"")
    skipping = validated([str(folder), f"data_dir={root}"], tmp_path / "skipping.json")["metrics"]
    assert {**metrics, "images_per_s": 0, "skipped": 1} == {**skipping, "images_per_s": 0}
    assert (metrics["images"], metrics["skipped"]) == (8, 0)
    assert f"skipped the picture {root}/val/b/002.png" in capsys.readouterr().out


def test_skipping_is_exact_however_the_run_goes(run, pictures, tmp_path, monkeypatch):
    root = spoilt(pictures, tmp_path / "data")
    settings = [*EVERYTHING_RANDOM, f"data_dir={root}", "bad_pictures=skip"]
    whole = run(*settings)
    with monkeypatch.context() as patch:
        interrupt(patch, after=2)
        stopped = run(*settings, "workers=1", output="stopped", status=128 + signal.SIGTERM)
    trained("stopped")
    assert same_weights(whole, stopped)
    assert losses(whole) == losses(stopped)
    assert read_checkpoint(whole / "last.pt")["skipped"].keys() == {"training", "validation"}
    for split, names in read_checkpoint(whole / "last.pt")["skipped"].items():
        assert set(names) == set(read_checkpoint(stopped / "last.pt")["skipped"][split])
    # Stopped by the first of them, it goes on when they are to be skipped.
    with pytest.raises(InputError, match="cannot use the picture"):
        run(*settings[:-1], output="refused")
    assert trained("refused", "bad_pictures=skip") == 0
    assert same_weights(whole, tmp_path / "refused")


def test_a_pass_without_pictures_stops_the_run(run, command, pictures, tmp_path):
    root = copied(pictures, tmp_path / "data")
    for picture in root.glob("train/*/*.png"):
        picture.write_bytes(b"")
    with pytest.raises(InputError, match=r"too few can be read: the last was .*/data/train/.*png; repair or remove"):
        run(f"data_dir={root}", "bad_pictures=skip")
    for picture in root.glob("val/*/*.png"):
        picture.write_bytes(b"")
    folder = run(f"data_dir={copied(pictures, tmp_path / 'good')}", "epochs=1", "bad_pictures=skip", output="good")
    status, _, error = command("classification/validate.py", folder, f"data_dir={root}")
    assert (status, error) == (2, "error: no picture of the validation split can be read\n")


def test_links_in_a_tar_are_not_followed(run, pictures, tmp_path):
    """Neither out of the archive nor within it: only what is a picture itself is one."""
    secret = tmp_path / "secret.png"
    drawn().save(secret)
    for split in ("train", "val"):
        root = copied(pictures / split, tmp_path / split)
        (root / "a" / "link.png").symlink_to(secret)
        (root / "b" / "up.png").symlink_to("../../secret.png")
        os.link(root / "c" / "000.png", root / "c" / "hard.png")
        subprocess.run(["tar", "cf", f"{tmp_path}/{split}.tar", "-C", str(root), "a", "b", "c"], check=True)
    folder = run(f"data_dir={tmp_path}", "train_split=train.tar", "val_split=val.tar", "epochs=1")
    record = json.loads((folder / "run.json").read_text())["data"]
    assert (record["train_images"], record["val_images"]) == (24, 9)


def test_an_index_of_tars_executes_nothing(run, pictures, tmp_path):
    """timm keeps what it found in large tars as a pickle beside them, and takes what is there."""
    marker = tmp_path / "executed"

    class Executes:
        def __reduce__(self):
            return os.mkdir, (str(marker),)

    for split in ("train", "val"):
        subprocess.run(["tar", "cf", f"{tmp_path}/{split}.tar", "-C", str(pictures / split), "a", "b", "c"], check=True)
        (tmp_path / f"_{split}_tarinfos.pickle").write_bytes(pickle.dumps({"tartrees": [Executes()]}))
    settings = [f"data_dir={tmp_path}", "train_split=train.tar", "val_split=val.tar"]
    with pytest.raises(InputError, match=r"cannot open the split 'train.tar' .*is not permitted"):
        run(*settings, "dataset_args={cache_tarinfo: true}")
    assert not marker.exists()


# Machines


def at_second_save(monkeypatch, action):
    original, saved = train.Trainer.save, []

    def save(self):
        saved.append(1)
        if len(saved) == 2:
            action(self)
        original(self)

    monkeypatch.setattr(train.Trainer, "save", save)


def test_a_full_disk_ends_the_run_in_a_sentence_and_keeps_the_last_checkpoint(run, shared_run, tmp_path, monkeypatch):
    whole = shared_run()
    with monkeypatch.context() as patch:
        at_second_save(patch, lambda trainer: (trainer.output / "last.pt.tmp").symlink_to("/dev/full"))
        with pytest.raises(InputError, match=r"^cannot write full/last.pt: No space left on device$"):
            run(output="full")
    record = json.loads((tmp_path / "full" / "run.json").read_text())
    assert (record["status"], record["error"]) == ("failed", "cannot write full/last.pt: No space left on device")
    assert read_checkpoint(tmp_path / "full" / "last.pt")["epoch"] == 1
    assert trained("full") == 0
    assert same_weights(whole, tmp_path / "full")
    assert losses(whole) == losses(tmp_path / "full")


def test_a_disk_that_fills_up_while_a_checkpoint_is_saved_is_named(tmp_path):
    (tmp_path / "last.pt").write_bytes(b"before")
    (tmp_path / "last.pt.tmp").symlink_to("/dev/full")
    with pytest.raises(InputError, match=r"^cannot write .*/last.pt: No space left on device$"):
        write_torch(tmp_path / "last.pt", {"a": torch.zeros(100_000)}, previous=tmp_path / "previous.pt")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"last.pt": b"before"}


def test_a_file_in_place_of_a_folder_leaves_nothing_behind(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=r"^cannot write .*/folder: Is a directory$"):
        write_file(tmp_path / "folder", b"content")
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]


def test_a_repository_around_an_environment_is_not_ours(tmp_path, monkeypatch):
    (tmp_path / "provenance.py").touch()
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "provenance.py"))
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "--message", "theirs"], check=True)
    found = provenance.provenance()
    assert (found["commit"], found["uncommitted_changes"]) == (None, None)
    subprocess.run([*git, "add", "."], check=True)
    assert len(provenance.provenance()["commit"]) == 40


def test_of_two_installed_versions_the_imported_one_is_recorded(tmp_path, monkeypatch):
    for version in ("2.0", "1.0"):
        package = tmp_path / version
        (package / f"timm-{version}.dist-info").mkdir(parents=True)
        (package / f"timm-{version}.dist-info/METADATA").write_text(f"Name: timm\nVersion: {version}\n")
        (package / "timm.py").write_text(f"__version__ = {version!r}\n")
        monkeypatch.syspath_prepend(package)
    monkeypatch.delitem(sys.modules, "timm")
    assert provenance.installed.__wrapped__()["timm"] == importlib.import_module("timm").__version__ == "1.0"


def test_where_the_record_cannot_be_written_the_first_error_is_the_one_said(run, tmp_path, monkeypatch):
    def spoil(trainer):
        (trainer.output / "run.json.tmp").mkdir()
        with torch.no_grad():
            trainer.model.stem.weight.fill_(float("nan"))

    at_second_save(monkeypatch, spoil)
    with pytest.raises(InputError, match=r"a weight was not finite at epoch 3, step 0; the last good checkpoint is"):
        run("epochs=3")


def test_a_loader_process_that_is_killed_ends_the_run_in_a_sentence(run, shared_run, tmp_path, monkeypatch):
    whole = shared_run(*EVERYTHING_RANDOM)
    original = train.Trainer.optimizer_step

    def step(self, batches):
        original(self, batches)
        if self.progress.epoch == 1:
            os.kill(self.train_loader._iterator._workers[0].pid, signal.SIGKILL)
            time.sleep(60)  # until PyTorch has noticed

    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "optimizer_step", step)
        with pytest.raises(MachineError, match=r"^a process of the loader has died \(.*killed by signal.*\), most"):
            run(*EVERYTHING_RANDOM, "workers=1", output="killed")
    assert json.loads((tmp_path / "killed" / "run.json").read_text())["status"] == "failed"
    assert trained("killed") == 0
    assert same_weights(whole, tmp_path / "killed")


def test_a_loader_process_is_named_once_where_pytorch_notices_late():
    """After the connection has broken, its handler of SIGCHLD raises in whatever the main process does next."""

    def notice(*_):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    earlier = signal.signal(signal.SIGALRM, notice)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        with pytest.raises(MachineError, match=r"has died .*reset by peer"), loader.loader_processes():
            raise ConnectionResetError(104, "Connection reset by peer")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, earlier)


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset by peer"), EOFError()])
def test_a_broken_connection_to_a_loader_process_is_one_that_died(error):
    with (
        pytest.raises(
            MachineError, match=r"^a process of the loader has died \((.*reset by peer|EOFError)\), most often"
        ),
        loader.loader_processes(),
    ):
        raise error


def test_a_machine_that_fails_is_one_sentence_and_status_1(capsys):
    def fail():
        raise MachineError("a process has died: start again")

    with pytest.raises(SystemExit) as end:
        run_command(fail)
    assert (end.value.code, capsys.readouterr().err) == (1, "error: a process has died: start again\n")


def test_a_picture_that_vanishes_is_named(run, pictures, tmp_path, monkeypatch):
    root = copied(pictures, tmp_path / "data")
    at_second_save(monkeypatch, lambda trainer: (root / "train/b/003.png").unlink())
    with pytest.raises(InputError, match=rf"cannot use the picture {root}/train/b/003.png \(FileNotFoundError: "):
        run(f"data_dir={root}", "epochs=3", "workers=1")
    assert read_checkpoint(tmp_path / "run" / "last.pt")["epoch"] == 2


# The campaign


def test_a_short_campaign_loses_nothing_and_fills_the_table(tmp_path):
    """The longer one is `make faults`."""
    arguments = ["--rounds", "1", "--quick", "--record", str(tmp_path / "record.json")]
    status, printed, error = Script("tests/faults.py", arguments, tmp_path).ended()
    assert status == 0, printed + error
    total = printed.splitlines()[-1].split()
    assert total[0] == "all"
    assert total[1] == total[2]
    assert total[3] == "0"
    [imported] = records.import_records([tmp_path / "record.json"], tmp_path / "results")
    measured = Measured(tmp_path / "results")
    table = faults(measured)
    assert [str(cell) for cell in table.rows[-1].values()] == total
    assert len(table.rows) == len(records.read_record(imported).faults) + 1
    section = outputs.sections({"faults": table}, measured, complete=False)["README.md", "faults"]
    assert f"injected {total[1]} faults" in section
    assert f"{total[2]} faults were survived and 0 were not" in section


def test_without_a_campaign_the_table_says_so(tmp_path):
    measured = Measured(tmp_path)
    sections = outputs.sections({"faults": faults(measured)}, measured, complete=False)
    assert sections == {("README.md", "faults"): "Not measured yet."}


def test_a_seed_that_no_campaign_prints_is_refused(command):
    status, _, error = command("tests/faults.py", "--only", 990000)
    assert (status, error) == (2, "error: --seed and --only take the numbers that a campaign prints\n")
