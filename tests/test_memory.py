"""Pictures in memory, compared with Pillow and timm, which augment single pictures."""

import random
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.transforms import PILToTensor
from torchvision.transforms import functional as F

from conftest import TINY, draw, trained
from metaformer import InputError
from metaformer.training import memory
from metaformer.training.augmentation import Crops, augment, crop_resize_flip, draw_crops
from metaformer.training.config import Config, load_config
from metaformer.training.data import open_split
from metaformer.training.distributed import join
from metaformer.training.loader import val_loader
from test_training import interrupt, same_weights

PLAIN = ("auto_augment=null", "color_jitter=0")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def draw_alike(root: Path, **options) -> Path:
    """Class folders of pictures of 40 x 36 pixels."""
    draw(root, **options)
    for file in root.rglob("*.png"):
        Image.open(file).resize((40, 36)).save(file)
    return root


@pytest.fixture(scope="module")
def alike(tmp_path_factory):
    return draw_alike(tmp_path_factory.mktemp("alike"), val_images=9)


@pytest.mark.parametrize("size", [24, 32, 57])
def test_crops_are_resized_and_flipped_as_by_pillow(size):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (64, 40, 36, 3), dtype=np.uint8)
    crops = draw_crops(Config(), rng, 64, 40, 36)
    cubic, hflip, vflip = rng.random((3, 64)) < 0.5
    ours = crop_resize_flip(torch.from_numpy(pixels).permute(0, 3, 1, 2), crops, size, cubic, hflip, vflip)
    for i, (top, left, height, width) in enumerate(zip(*crops, strict=True)):
        filter = F.InterpolationMode.BICUBIC if cubic[i] else F.InterpolationMode.BILINEAR
        picture = F.resized_crop(Image.fromarray(pixels[i]), top, left, height, width, [size, size], filter)
        picture = F.hflip(picture) if hflip[i] else picture
        picture = F.vflip(picture) if vflip[i] else picture
        assert torch.equal(ours[i], F.pil_to_tensor(picture))


def test_a_picture_that_is_not_cropped_is_unchanged():
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    whole = Crops(*(np.full(2, side) for side in (0, 0, 32, 32)))
    none = np.zeros(2, dtype=bool)
    assert torch.equal(crop_resize_flip(pixels, whole, 32, np.array([False, True]), none, none), pixels)


@pytest.mark.parametrize(
    ("height", "width", "scale", "ratio"),
    [(40, 36, (0.08, 1.0), (3 / 4, 4 / 3)), (16, 64, (0.5, 1.0), (3 / 4, 4 / 3)), (30, 10, (0.9, 1.0), (0.9, 1.1))],
    ids=["usual", "wide, often central", "tall, always central"],
)
def test_crops_have_the_distribution_of_timm(height, width, scale, ratio):
    random.seed(0)
    picture = Image.new("RGB", (width, height))
    theirs = [RandomResizedCropAndInterpolation.get_params(picture, scale, ratio) for _ in range(4000)]
    theirs = [np.array(values) for values in zip(*theirs, strict=True)]
    ours = draw_crops(Config(scale=scale, ratio=ratio), np.random.default_rng(0), 4000, height, width)
    for mine, reference in zip(ours, (theirs[0], theirs[1], theirs[2], theirs[3]), strict=True):
        assert ks_2samp(mine, reference).pvalue > 1e-3
    assert ks_2samp(ours.width / ours.height, theirs[3] / theirs[2]).pvalue > 1e-3


def test_filters_and_flips_are_drawn_as_often_as_asked():
    half = load_config(
        ["--data-in-memory", *PLAIN, "img_size=32", "scale=[1, 1]", "ratio=[1, 1]", "hflip=0.25", "vflip=0"]
    )
    pixels = torch.arange(32, dtype=torch.uint8).expand(4000, 3, 32, 32)
    flipped = augment(half, pixels, np.random.default_rng(0))[:, 0, 0, 0] == 31
    assert 0.22 < flipped.float().mean() < 0.28


def test_validation_pictures_are_those_of_the_loader(pictures):
    batches = []
    for in_memory in ("false", "true"):
        config = load_config([*TINY, *PLAIN, f"data_dir={pictures}", f"data_in_memory={in_memory}", "crop_pct=0.9"])
        config = config.model_copy(update={"interpolation": "bicubic"})
        batches.append(list(val_loader(config, open_split(config, "validation", 0), join(), 0)))
    for files, kept in zip(*batches, strict=True):
        assert torch.equal(files.images, kept.images)
        assert torch.equal(files.labels, kept.labels)


def test_an_interrupted_run_continues_to_the_same_weights(run, alike, monkeypatch):
    settings = (f"data_dir={alike}", "data_in_memory=true", "mixup=0.8", "cutmix=1", "erase_prob=0.5", "workers=1")
    whole = run(*settings)
    with monkeypatch.context() as patch:
        interrupt(patch, after=4, number=signal.SIGTERM)
        stopped = run(*settings, output="stopped", status=128 + signal.SIGTERM)
    assert trained("stopped") == 0
    assert same_weights(whole, stopped)


def test_what_is_drawn_follows_from_seed_epoch_and_picture():
    config = load_config(["--data-in-memory", *PLAIN, "img_size=32", "scale=[0.1, 0.5]"])
    pictures = memory.Pictures(torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8), torch.arange(8))

    def drawn(seed, epoch, first):
        settings = config.model_copy(update={"seed": seed})
        batches = memory.InMemory(pictures, torch.device("cpu"), settings)
        return batches.__getitems__([(epoch, first), (epoch, 7)]).images[1]

    assert torch.equal(drawn(0, 0, 1), drawn(0, 0, 1))
    for other in ((1, 0, 1), (0, 1, 1), (0, 0, 2)):
        assert not torch.equal(drawn(0, 0, 1), drawn(*other))


def test_a_link_to_nowhere_is_named(tmp_path):
    root = draw_alike(tmp_path / "data")
    file = root / "train" / "b" / "002.png"
    file.unlink()
    file.symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(InputError, match=r"002\.png is not .*: take it out"):
        memory.load_pictures(open_split(load_config([f"data_dir={root}"]), "train", 0), PILToTensor(), {})


def test_pictures_are_decoded_once_until_a_file_changes(tmp_path, monkeypatch):
    decoded = []
    decode = memory.decode
    monkeypatch.setattr(memory, "decode", lambda *arguments: decoded.append(1) or decode(*arguments))
    root = draw_alike(tmp_path / "data")

    def load():
        dataset = open_split(load_config([f"data_dir={root}"]), "train", 0)
        return memory.load_pictures(dataset, PILToTensor(), {})

    first, second = load(), load()
    assert len(decoded) == 1
    assert all(map(torch.equal, first, second))
    file = next((root / "train").rglob("*.png"))
    Image.new("RGB", (40, 36), "red").save(file)
    assert (load().images[:, 0] == 255).flatten(1).all(1).any()
    assert len(decoded) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: Image.new("RGB", (41, 36)).save(file), "has 41 x 36 pixels instead of 40 x 36: resize it"),
        (lambda file: file.write_bytes(b"no picture"), "002.png is not .*: take it out"),
    ],
    ids=["other size", "damaged"],
)
def test_pictures_that_do_not_fit_are_named(tmp_path, change, message):
    root = draw_alike(tmp_path / "data")
    change(root / "train" / "b" / "002.png")
    with pytest.raises(InputError, match=message):
        memory.load_pictures(open_split(load_config([f"data_dir={root}"]), "train", 0), PILToTensor(), {})


def test_a_stream_is_refused():
    stream = type("Stream", (torch.utils.data.IterableDataset,), {"__iter__": lambda self: iter(())})()
    with pytest.raises(InputError, match="this is a stream"):
        memory.load_pictures(stream, PILToTensor(), {})


@pytest.mark.parametrize(
    "setting", ["auto_augment=rand-m9", "color_jitter=0.4", "train_interpolation=lanczos", "bad_pictures=skip"]
)
def test_settings_that_memory_does_not_have_are_refused(setting):
    with pytest.raises(InputError, match="data_in_memory=true"):
        load_config(["data_in_memory=true", *PLAIN, setting])
