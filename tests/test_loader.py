"""The training loader's speed: the arithmetic, the record, decoders that see the same pictures, and wrong input."""

import io
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from metaformer.analysis import loader
from metaformer.analysis import tables as make_tables
from metaformer.errors import run_command
from metaformer.records import import_records
from metaformer.training.config import Config
from metaformer.training.data import open_split, train_loader, transform
from metaformer.training.distributed import Processes

SIDE = 32

# analysis/loader.py measures what the pinned torchvision has, which it says it will give up.
pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities:DeprecationWarning")


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
def command(monkeypatch, capsys, config_file):
    """command("--images", 8, ...) gives the exit status and what was printed; PyTorch's threads are put back."""
    threads = torch.get_num_threads()

    def command(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["analysis/loader.py", "--config", str(config_file), *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            run_command(loader.main)
        printed = capsys.readouterr()
        return exit_.value.code, printed.out, printed.err

    yield command
    torch.set_num_threads(threads)
    loader.cv2.setNumThreads(-1)


def test_workers_needed():
    assert loader.workers_needed(1000, 250) == 4
    assert loader.workers_needed(1001, 250) == 5
    assert loader.workers_needed(10, 250) == 1


@pytest.mark.parametrize(
    ("images", "device_batch", "workers", "number", "batch"),
    [(500, 128, 1, 4, 125), (500, 128, 3, 6, 83), (100, 128, 2, 2, 50), (3, 128, 3, 3, 1)],
)
def test_each_worker_has_as_many_batches(images, device_batch, workers, number, batch):
    batches = list(loader.equal_batches(1000, images, device_batch, workers, seed=1))
    assert [len(keys) for keys in batches] == [batch] * number
    assert len({index for keys in batches for _, index in keys}) == number * batch


def test_record(jpegs, tmp_path, command):
    path = tmp_path / "loader.json"
    arguments = ["--data-dir", jpegs, "--workers", 2, "--images", 10, "--rounds", 3, "--consume", 5000]
    status, printed, _ = command(*arguments, "--record", path)
    assert status == 0
    record = json.loads(path.read_text())
    import_records([path], tmp_path / "results")
    rows = make_tables.loader(make_tables.Measured(tmp_path / "results")).rows
    assert [row["decoder"] for row in rows] == list(record["decoders"])
    needed = record["decoders"]["opencv"]["workers_needed"]
    assert (rows[3]["workers"], rows[3]["workers for"]) == ("2", f"5,000 images/s: {needed}")
    assert record["kind"] == "loader"
    assert (record["workers"], record["images"], record["batch"], record["rounds"]) == (2, 8, 2, 3)
    assert record["data"]["images"] == 12
    assert record["data"]["classes"] == 2
    assert 90 <= record["data"]["mean_width"] <= 101
    assert record["settings"]["auto_augment"] == "rand-m9-mstd0.5-inc1"
    assert record["consume_images_per_s"] == 5000
    assert record["command"].startswith("python analysis/loader.py")
    assert {"commit", "versions", "hardware", "date", "libjpeg_turbo_of_pillow"} <= record.keys()
    assert list(record["split_ms"]) == [
        *("seed", "read", "decode", "crop and resize", "flip", "RandAugment", "to tensor", "collate")
    ]
    assert list(record["decoders"]) == ["pillow", "pillow_draft", "torchvision", "opencv"]
    for name, measured in record["decoders"].items():
        for key in ("decode_images_per_s", "loader_images_per_s_per_worker", "loader_relative_to_pillow"):
            assert 0 < measured[key]["min"] <= measured[key]["median"] <= measured[key]["max"]
        rate = measured["loader_images_per_s_per_worker"]["median"]
        assert (measured["workers_needed"] - 1) * rate < 5000 <= measured["workers_needed"] * rate
        assert (name in printed, f"{measured['workers_needed']:,}" in printed) == (True, True)
        assert (measured["pixels"]["resized"] > 0) == (name == "pillow_draft")
        if name != "pillow_draft":
            assert measured["pixels"] == {"resized": 0, "differing": 0, "largest_difference": 0}


def test_without_consume_no_workers_are_said(jpegs, command):
    status, printed, _ = command("--data-dir", jpegs, "--images", 4, "--rounds", 1)
    assert status == 0
    assert "workers for" not in printed


@pytest.mark.parametrize(("mode", "levels"), [("RGB", 0), ("L", 0), ("CMYK", 1)])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 1}])
def test_decoders_see_the_same_pixels(mode, levels, options):
    file = io.BytesIO()
    turned = Image.Exif()
    turned[0x0112] = 6  # the training loader leaves pictures as they are stored
    smooth(133, 87).convert(mode).save(file, "JPEG", exif=turned, **(options if mode != "L" else {}))
    for name, decode in loader.decoders(SIDE).items():
        pixels = loader.compare({"a.jpg": file.getvalue()}, decode)
        if name == "pillow_draft":
            assert pixels["resized"] == 1
        else:
            assert pixels["resized"] == 0
            assert pixels["largest_difference"] <= (levels if name == "opencv" else 0)


def test_draft_mode_keeps_the_side_that_the_network_takes():
    file = io.BytesIO()
    smooth(160, 128).save(file, "JPEG")
    sizes = [loader.pillow_draft(side, io.BytesIO(file.getvalue())).size for side in (16, 32, 64, 65)]
    assert sizes == [(20, 16), (40, 32), (80, 64), (160, 128)]


def test_differences_are_counted():
    file = io.BytesIO()
    smooth(40, 40).save(file, "JPEG")

    def brighter(encoded):
        pixels = np.asarray(loader.pillow(encoded)).copy()
        pixels[0, 0] ^= 4
        return Image.fromarray(pixels)

    files = dict.fromkeys(("a.jpg", "b.jpg"), file.getvalue())
    assert loader.compare(files, brighter) == {"resized": 0, "differing": 2, "largest_difference": 4}


def test_another_decoder_stands_behind_the_same_transforms(jpegs):
    """Where the pixels are equal, their loaders give what the training loader gives, to the last bit."""
    settings = {"img_size": SIDE, "auto_augment": "rand-m9-mstd0.5-inc1", "mean": (0.5,) * 3, "std": (0.5,) * 3}
    config = Config(data_dir=str(jpegs), **settings)
    dataset = open_split(config, "train", workers=0, is_training=True)
    batches = loader.equal_batches(12, 12, 12, 1, seed=0)
    trained_with = train_loader(config, dataset, batches, Processes(torch.device("cpu")), workers=0)
    expected, labels, _ = next(iter(trained_with))
    keys = next(iter(batches))
    augment = transform(config, is_training=True)
    for name in ("torchvision", "opencv"):
        images = loader.DecodedImages(dataset, augment, config.seed, loader.decoders(SIDE)[name])
        found, found_labels, _ = loader.collate([images[key] for key in keys])
        assert torch.equal(found, expected)
        assert torch.equal(found_labels, labels)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--data-dir", "nowhere"], "there is no data folder nowhere"),
        (["--images", 0], "--images is 0: give 1 or more"),
        (["--workers", 0], "--workers is 0: give 1 or more"),
        (["--rounds", 0], "--rounds is 0: give 1 or more"),
        (["--consume", 0], "--consume is 0: give the images per second"),
        (["--consume", "nan"], "--consume is nan: give the images per second"),
        (["--images", 2, "--workers", 3], "2 images are too few for 3 workers"),
        (["--config", "none.yaml"], "there is no config none.yaml"),
        (["--rounds", 1, "--images", 1, "--record", "nowhere/loader.json"], "cannot write nowhere/loader.json"),
    ],
)
def test_wrong_input(arguments, says, jpegs, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    status, _, error = command("--data-dir", jpegs, *arguments)
    assert status == 2
    assert error.startswith(f"error: {says}")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"text", "cannot open the split 'train' of"),
        ("a.png", None, "a.png is not a JPEG, and decoders of JPEGs are compared: give a folder of JPEGs alone"),
        ("a.jpg", b"\xff\xd8\xff and no more", "a.jpg cannot be decoded"),
    ],
)
def test_pictures_that_are_no_jpegs(name, content, says, tmp_path, command):
    folder = tmp_path / "train" / "a"
    folder.mkdir(parents=True)
    if content is None:
        smooth(40, 40).save(folder / name)
    else:
        (folder / name).write_bytes(content)
    status, _, error = command("--data-dir", tmp_path)
    assert status == 2
    assert says in error
    assert error.count("\n") == 1
