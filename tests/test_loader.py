"""The training loader's speed: the arithmetic, the record, and wrong input."""

import json
import shutil

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from timm.data import create_transform
from timm.data.loader import fast_collate

from conftest import pack
from metaformer.analysis import loader, speed
from metaformer.analysis.measured import Measured
from metaformer.records import import_records
from metaformer.training.batches import TrainBatches, seed_everything
from metaformer.training.config import load_config
from metaformer.training.data import open_split
from metaformer.training.distributed import Processes, join
from metaformer.training.loader import train_loader

SIDE = 32


def smooth(width: int, height: int) -> Image.Image:
    """A picture as cameras make them: colours that change slowly, with some noise."""
    rng = np.random.default_rng(width)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    noise = rng.integers(-8, 9, (height, width, 3))
    return Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory):
    """12 JPEGs in two classes, of which half have both sides of twice the network's input or more."""
    root = tmp_path_factory.mktemp("jpegs")
    for i in range(12):
        folder = root / "train" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        smooth(90 + i, 51 if i % 4 < 2 else 75).save(folder / f"{i:02d}.jpg", quality=90)
    return root


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    path.write_text(f"img_size: {SIDE}\ndevice_batch: 4\nauto_augment: rand-m9-mstd0.5-inc1\n")
    return path


@pytest.fixture
def measure(command, config_file):
    """measure("--images", 8, ...) gives the exit status and what was printed; PyTorch's threads are put back."""
    threads = torch.get_num_threads()
    yield lambda *arguments: command("analysis/loader.py", "--config", config_file, *arguments)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("workers", [0, 1])
def test_pictures_are_those_of_timm_whatever_their_encoding(workers, tmp_path):
    folder = tmp_path / "train" / "a"
    folder.mkdir(parents=True)
    picture = smooth(90, 70)
    rotated = Image.Exif()
    rotated[0x0112] = 6  # orientation
    picture.save(folder / "444.jpg", subsampling="4:4:4")
    picture.save(folder / "422.jpg", subsampling="4:2:2")
    picture.save(folder / "420.jpg", subsampling="4:2:0", progressive=True)
    picture.save(folder / "exif.jpg", exif=rotated)
    picture.convert("L").save(folder / "grey.jpg")
    picture.convert("CMYK").save(folder / "cmyk.jpg")
    picture.save(folder / "rgb.png", transparency=(0, 0, 0))
    picture.convert("P").save(folder / "palette.png")

    options = {"scale": (0.3, 1.0), "ratio": (0.5, 2.0), "hflip": 0.5, "vflip": 0.3, "mean": (0.5, 0.4, 0.3)}
    options["auto_augment"] = "rand-m9-mstd0.5-inc1"
    config = load_config([]).model_copy(update={**options, "img_size": SIDE, "train_interpolation": "random"})
    dataset = torchvision.datasets.ImageFolder(tmp_path / "train")
    batches = TrainBatches(len(dataset), 8, accumulation=1, rank=0, world=1, seed=config.seed)
    (batch,) = train_loader(config, dataset, batches, join(), workers)

    options |= {"is_training": True, "use_prefetcher": True, "interpolation": "random"}
    theirs, expected = create_transform(SIDE, **options), []
    for epoch, index in next(iter(batches)):
        seed_everything(config.seed, epoch, index)
        path, label = dataset.samples[index]
        expected.append((theirs(Image.open(path).convert("RGB")), label))
    images, labels = fast_collate(expected)
    assert torch.equal(batch.images, images)
    assert torch.equal(batch.labels, labels)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_has_the_batches_of_an_epoch_and_each_device_draws_its_own(workers, pictures, tmp_path):
    """Each loader process has 12 of the 24 pictures, which are a whole batch of ``device_batch`` and not two of 7."""
    settings = [f"data_dir={pack(tmp_path / 'wds', pictures, train=2)}", "dataset=wds/local", f"img_size={SIDE}"]
    config = load_config([*settings, "device_batch=12", "mean=[0, 0, 0]"])

    def loaded(rank: int) -> list:
        torch.manual_seed(0)  # as a run does in each process
        batches = TrainBatches(24, 7, accumulation=1, rank=rank, world=1, seed=0)
        dataset = open_split(config, "train", workers=workers, is_training=True)
        processes = Processes(torch.device("cpu"), rank=rank, world=2)
        return list(train_loader(config, dataset, batches, processes, workers)), batches.steps

    (batches, steps), (same, _), (other, _) = map(loaded, (0, 0, 1))
    assert len(batches) >= steps
    assert torch.equal(batches[0].images, same[0].images)
    assert not torch.equal(batches[0].images, other[0].images)


@pytest.mark.parametrize(
    ("images", "device_batch", "workers", "number", "batch"),
    [(500, 128, 1, 4, 125), (500, 128, 3, 6, 83), (100, 128, 2, 2, 50), (3, 128, 3, 3, 1)],
)
def test_each_worker_has_as_many_batches(images, device_batch, workers, number, batch):
    batches = list(loader.equal_batches(1000, images, device_batch, workers, seed=1))
    assert [len(keys) for keys in batches] == [batch] * number
    assert len({index for keys in batches for _, index in keys}) == number * batch


def test_record(jpegs, tmp_path, measure):
    path = tmp_path / "loader.json"
    arguments = ["--data-dir", jpegs, "--workers", 2, "--images", 10, "--rounds", 3, "--consume", 5000]
    status, printed, _ = measure(*arguments, "--record", path)
    assert status == 0
    record = json.loads(path.read_text())
    assert record["kind"] == "loader"
    assert (record["workers"], record["images"], record["batch"], record["rounds"]) == (2, 8, 2, 3)
    assert record["data"]["images"] == 12
    assert record["data"]["classes"] == 2
    sizes = {path: Image.open(path).size for path in jpegs.glob("train/*/*.jpg")}
    assert min(width for width, _ in sizes.values()) <= record["data"]["mean_width"] <= 101
    assert 51 <= record["data"]["mean_height"] <= 75
    assert 500 < record["data"]["mean_bytes"] < max(path.stat().st_size for path in sizes)
    assert record["settings"]["auto_augment"] == "rand-m9-mstd0.5-inc1"
    assert "analysis/loader.py --config" in record["command"]
    assert {"commit", "versions", "hardware", "date"} <= record.keys()
    ((name, found),) = record["decoders"].items()
    assert name == "pillow"
    for key in ("decode_images_per_s", "loader_images_per_s_per_worker"):
        assert 0 < found[key]["min"] <= found[key]["median"] <= found[key]["max"]
    rate = found["loader_images_per_s_per_worker"]["median"]
    assert "8 pictures, median of 3 rounds" in printed
    needed = int(printed.split("workers for 5,000 images/s: ")[1])
    assert (needed - 1) * rate < 5000 <= needed * rate

    import_records([path], tmp_path / "results")
    (row,) = speed.loader(Measured(tmp_path / "results")).rows
    assert (row["decoder"], str(row["workers"])) == ("pillow", "2")
    assert row["whole loader, images/s per worker"].value == rate


def test_the_loader_decodes_whatever_the_config_does(jpegs, tmp_path, measure):
    """Pictures of several sizes cannot be in memory; a damaged one has no size."""
    config = tmp_path / "config.yaml"
    arguments = ["--config", config, "--images", 4, "--rounds", 1]
    config.write_text(f"img_size: {SIDE}\ndata_in_memory: true\ntrain_interpolation: bilinear\n")
    assert measure("--data-dir", jpegs, *arguments)[0] == 0
    config.write_text(f"img_size: {SIDE}\nbad_pictures: skip\n")
    damaged = shutil.copytree(jpegs, tmp_path / "damaged") / "train/a/00.jpg"
    damaged.write_bytes(damaged.read_bytes()[:200])
    status, _, error = measure("--data-dir", tmp_path / "damaged", *arguments[:2])
    assert (status, "00.jpg" in error, error.count("\n")) == (2, True, 1)


def test_needed_workers_are_rounded_up(jpegs, monkeypatch, measure):
    monkeypatch.setattr(loader, "seconds_of_epoch", lambda *_: 0.08)  # 8 pictures by 2 workers: 50 a second each
    for consume, needed in ((210, 5), (200, 4), (10, 1)):
        arguments = ["--data-dir", jpegs, "--workers", 2, "--images", 8, "--rounds", 1, "--consume", consume]
        assert measure(*arguments)[1].endswith(f"workers for {consume} images/s: {needed}\n")


def test_without_consume_no_workers_are_said(jpegs, measure):
    status, printed, _ = measure("--data-dir", jpegs, "--images", 4, "--rounds", 1)
    assert status == 0
    assert "workers for" not in printed


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--data-dir", "nowhere"], "there is no data folder nowhere"),
        (["--images", 0], "--workers, --images and --rounds: give whole numbers from 1"),
        (["--workers", 0], "--workers, --images and --rounds: give whole numbers from 1"),
        (["--rounds", 0], "--workers, --images and --rounds: give whole numbers from 1"),
        (["--consume", 0], "--consume is 0: give the images/s"),
        (["--consume", "nan"], "--consume is nan: give the images/s"),
        (["--images", 2, "--workers", 3], "2 images are too few for 3 workers"),
        (["--config", "none.yaml"], "there is no config none.yaml"),
        (["--rounds", 1, "--images", 1, "--record", "/dev/null/loader.json"], "cannot write /dev/null/loader.json"),
    ],
)
def test_wrong_input(arguments, says, jpegs, tmp_path, monkeypatch, measure):
    monkeypatch.chdir(tmp_path)
    status, _, error = measure("--data-dir", jpegs, *arguments)
    assert status == 2
    assert error.startswith(f"error: {says}")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"text", "cannot open the split 'train' of"),
        ("a.jpg", b"\xff\xd8\xff and no more", "a.jpg (UnidentifiedImageError: "),
    ],
)
def test_folders_without_pictures(name, content, says, tmp_path, measure):
    for label in "ab":
        (tmp_path / "train" / label).mkdir(parents=True)
        (tmp_path / "train" / label / name).write_bytes(content)
    status, _, error = measure("--data-dir", tmp_path)
    assert status == 2
    assert says in error
    assert error.count("\n") == 1
