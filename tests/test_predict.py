"""Predictions of pictures: against the model's own logits and transformers' preprocessing, and what cannot be read."""

import csv
import io
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_dataset
from transformers import PoolFormerImageProcessor
from transformers.image_utils import load_image

import metaformer
from conftest import run_script
from metaformer import open_checkpoint
from metaformer.prediction import Pictures, find_pictures, names_of
from metaformer.training.batches import Images, transform
from metaformer.training.config import Config
from oracles import save_run


@pytest.fixture
def predicted(command):
    def predicted(*arguments: object, status: int = 0) -> tuple[str, str]:
        code, out, err = command("classification/predict.py", *arguments)
        assert code == status, err
        return out, err

    return predicted


@pytest.mark.parametrize("settings", [{}, {"ema_decay": 0.9, "mean": (0.5, 0.4, 0.3), "interpolation": "bilinear"}])
def test_predicts_what_the_model_says(settings, pictures, tmp_path, predicted):
    model = save_run(tmp_path / "run", **settings)
    out, _ = predicted(pictures / "val", "--checkpoint", tmp_path / "run", "--top", 2, "--batch", 4, "--json")
    predictions = json.loads(out)
    paths = sorted((pictures / "val").rglob("*.png"))
    assert [prediction["file"] for prediction in predictions] == [str(file) for file in paths]
    opened = open_checkpoint(tmp_path / "run")
    inputs = {name: getattr(opened, name) for name in ("mean", "std", "crop_pct", "interpolation")}
    prepare = timm.data.create_transform(32, **inputs)
    for file, prediction in zip(paths, predictions, strict=True):
        with torch.inference_mode():
            shares = model(prepare(Image.open(file).convert("RGB"))[None]).softmax(1)[0]
        assert [best["index"] for best in prediction["classes"]] == shares.topk(2).indices.tolist()
        assert prediction["classes"][0]["class"] == "abc"[shares.argmax()]
        assert prediction["classes"][0]["probability"] == pytest.approx(shares.max().item(), abs=1e-5)

    out, _ = predicted(paths[0], "--checkpoint", tmp_path / "run" / "best.pt", "--csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [row["rank"] for row in rows] == ["1", "2", "3"]  # of three classes, though five are asked for
    assert sum(float(row["probability"]) for row in rows) == pytest.approx(1, abs=1e-4)
    out, _ = predicted(paths[0], "--checkpoint", tmp_path / "run")
    assert re.match(rf"{paths[0]}\n  +\d+\.\d\d %  [abc]\n", out)


def test_weights_from_elsewhere_and_imagenet_s_names(pictures, tmp_path, predicted, monkeypatch):
    model = timm.create_model("poolformer_s12")
    file = tmp_path / "poolformer_s12.pth.tar"
    torch.save(metaformer.convert(model.state_dict(), "official"), file)
    arguments = (pictures / "val" / "a", "--checkpoint", file)
    out, _ = predicted(*arguments, "--model", "poolformer_s12", "--json")
    assert all(len(prediction["classes"]) == 5 for prediction in json.loads(out))
    assert names_of(open_checkpoint(file, "poolformer_s12"))[281].startswith("tabby")
    monkeypatch.setattr(metaformer.variants, "fetch", lambda *_: file)  # the released weights
    assert predicted(pictures / "val" / "a", "--model", "poolformer_s12", "--json")[0] == out
    error = predicted(*arguments, status=2)[1]
    assert "does not say what model it is of: give --model" in error


MODES = {
    "grey.png": ("L", (40, 50)),
    "alpha.png": ("RGBA", (41, 33)),
    "palette.gif": ("P", (20, 70)),
    "cmyk.jpg": ("CMYK", (64, 48)),
    "sixteen.png": ("I;16", (30, 30)),
    "dot.png": ("RGB", (1, 1)),
    "line.png": ("RGB", (300, 1)),
}


def draw_kinds(folder: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    for name, (mode, size) in MODES.items():
        if mode == "I;16":
            picture = Image.fromarray(rng.integers(0, 2**16, size[::-1], dtype=np.uint16))
        else:
            # Few large patches, so that no picture is noise alone.
            rough = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
            picture = rough.resize(size, Image.Resampling.BICUBIC).convert(mode)
        exif = Image.Exif()
        exif[0x0112] = 6 if name == "cmyk.jpg" else 1  # turned by 90 degrees, or upright
        picture.save(folder / name, exif=exif)
    return [folder / name for name in MODES]


def test_all_kinds_of_pictures_and_those_that_cannot_be_read(tmp_path, predicted):
    save_run(tmp_path / "run")
    (tmp_path / "odd" / "below").mkdir(parents=True)
    draw_kinds(tmp_path / "odd")
    (tmp_path / "odd" / "below" / "broken.jpg").write_bytes(b"no picture")
    (tmp_path / "odd" / "notes.txt").write_text("not looked at")
    out, err = predicted(tmp_path / "odd", "--checkpoint", tmp_path / "run", "--batch", 3, "--json", status=1)
    assert {prediction["file"].rpartition("/")[2] for prediction in json.loads(out)} == MODES.keys()
    assert err.count("cannot read") == 1
    assert "broken.jpg: UnidentifiedImageError" in err


def test_linked_folders_are_searched(pictures, tmp_path):
    """As by the reader of the training pictures."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/linked").symlink_to(pictures / "val")
    names = create_dataset("", tmp_path / "data").filenames(absolute=True)
    assert find_pictures([tmp_path / "data"]) == sorted(map(Path, names))
    assert names


def test_a_run_in_float16_and_a_name_that_is_not_text(pictures, tmp_path, capfdbinary):
    save_run(tmp_path / "run", precision="float16")
    name = os.fsencode(tmp_path) + b"/\xff.png"
    shutil.copy(next((pictures / "val/a").iterdir()), name)
    assert run_script("classification/predict.py", os.fsdecode(name), "--checkpoint", tmp_path / "run") == 0
    assert capfdbinary.readouterr().out.startswith(name + b"\n  ")


def test_pictures_are_turned_as_the_camera_says(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    upright = Image.fromarray(pixels)
    upright.save(tmp_path / "upright.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    config = Config(img_size=32, crop_pct=0.9, interpolation="bicubic")
    prepared = Images(Pictures([tmp_path / "upright.png", tmp_path / "turned.png"]), transform(config, False), seed=0)
    (one, _), (other, _) = prepared[0, 0], prepared[0, 1]
    assert (np.asarray(one) == np.asarray(other)).all()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere"], "there is no picture or folder nowhere"),
        (["{empty}"], "there are no pictures in"),
        (["{picture}"], "give --checkpoint RUN_OR_FILE, or --model NAME"),
        (["{picture}", "--checkpoint", "nowhere.pt"], "there is no checkpoint nowhere.pt"),
        (["{picture}", "--checkpoint", "nowhere.pt", "--top", "0"], "--top and --batch are at least 1"),
    ],
)
def test_wrong_input_to_predict(arguments, says, pictures, tmp_path, predicted):
    (tmp_path / "empty").mkdir()
    names = {"picture": next((pictures / "val/a").iterdir()), "empty": tmp_path / "empty"}
    assert says in predicted(*[argument.format(**names) for argument in arguments], status=2)[1]


# Preprocessing


@pytest.mark.parametrize("crop_pct", [0.90, 0.95])
@pytest.mark.parametrize("size", [(128, 128), (401, 225), (375, 500), (640, 427), (300, 2)])
def test_preprocessing_is_transformers_to_two_grey_levels(size, crop_pct):
    """transformers resizes with another implementation of bicubic, which rounds now and then to the other side.

    Where the crop cannot be in the middle, transformers' is sometimes one pixel further up or left than torchvision's,
    which timm and the official code use: half a pixel is cut there and rounded to the even number here.
    """
    rough = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    picture = Image.fromarray(rough).resize(size, Image.Resampling.BICUBIC)
    config = Config(crop_pct=crop_pct, interpolation="bicubic", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    ours = np.asarray(transform(config, is_training=False)(picture)).astype(int)
    theirs = PoolFormerImageProcessor(crop_pct=crop_pct)(picture, return_tensors="np")["pixel_values"][0]
    mean, std = (255 * np.array(values).reshape(3, 1, 1) for values in (config.mean, config.std))
    theirs = np.rint(theirs * std + mean).astype(int)
    assert ours.shape == theirs.shape == (3, 224, 224)
    shift_x, shift_y = (round((side - 224) / 2) - (side - 224) // 2 for side in resized(size, int(224 / crop_pct)))
    ours, theirs = ours[:, : 224 - shift_y, : 224 - shift_x], theirs[:, shift_y:, shift_x:]
    difference = np.abs(ours - theirs)
    assert difference.max() <= 2
    assert difference.mean() < 0.05


def test_all_kinds_of_pictures_are_read_as_by_transformers(tmp_path):
    """Grey, with alpha, a palette, CMYK, turned, of one pixel: as its pipeline loads them.

    But for 16 bits, which it cuts off at 255: there the upper 8 are the picture.
    """
    config = Config(crop_pct=0.9, interpolation="bicubic")
    paths = draw_kinds(tmp_path)
    ours = Images(Pictures(paths), transform(config, False), seed=0)
    processor = PoolFormerImageProcessor(do_normalize=False, do_rescale=False)
    for index, path in enumerate(paths):
        picture = load_image(str(path))
        if path.name == "sixteen.png":
            picture = Image.fromarray((np.asarray(Image.open(path)) >> 8).astype(np.uint8)).convert("RGB")
        theirs = processor(picture, return_tensors="np", input_data_format="channels_first")
        difference = np.abs(np.asarray(ours[0, index][0]).astype(int) - np.rint(theirs["pixel_values"][0]).astype(int))
        assert difference.max() <= 2, path.name
        assert difference.mean() < 0.05, path.name


def resized(size: tuple[int, int], shortest: int) -> tuple[int, int]:
    width, height = size
    return (shortest, int(shortest * height / width)) if width < height else (int(shortest * width / height), shortest)
