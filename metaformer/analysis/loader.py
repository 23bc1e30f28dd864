"""Images per second of the training loader, of JPEG decoders alone and behind it, and where a picture's time goes.

python analysis/loader.py --data-dir FOLDER [--config FILE] [--workers N] [--images N] [--rounds N]
    [--consume IMAGES_PER_S] [--record FILE]

The loader is the one that classification/train.py builds for the config, on FOLDER/train/CLASS/*.jpg. What training
does to whole batches on the device (normalisation, random erasing, Mixup, CutMix) is not in it. The pictures are the
same in every round and come from the system's file cache: a slow disk or network must be measured by itself.
"""

import argparse
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import cv2
import numpy as np
import torch
from PIL import Image, features
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_jpeg
from tqdm import tqdm

from metaformer.errors import InputError
from metaformer.provenance import provenance, write_json
from metaformer.training.config import CONFIGS, Config, load_config
from metaformer.training.data import (
    Images,
    TrainBatches,
    checked,
    class_names,
    collate,
    count_classes,
    loader_options,
    open_split,
    seed_everything,
    shut_down,
    train_loader,
    transform,
)
from metaformer.training.distributed import Processes, join
from metaformer.training.model import build_model, with_input_of

Decoder = Callable[[BinaryIO], Image.Image]
STEPS = {
    "RandomResizedCropAndInterpolation": "crop and resize",
    "RandomHorizontalFlip": "flip",
    "RandAugment": "RandAugment",
    "MaybePILToTensor": "to tensor",
}
"""What the report calls timm's transforms; others go by the name of their class."""
INPUT_SETTINGS = {
    *("img_size", "scale", "ratio", "hflip", "vflip", "train_interpolation", "auto_augment", "color_jitter", "seed"),
    *("mean", "std"),  # RandAugment fills with the mean
}


def pillow(file: BinaryIO) -> Image.Image:
    """As the training loader decodes."""
    return Image.open(file).convert("RGB")


def pillow_draft(side: int, file: BinaryIO) -> Image.Image:
    """Scaled by 1/2, 1/4 or 1/8 in the DCT, while both sides keep ``side`` pixels: other pixels than in training."""
    image = Image.open(file)
    image.draft("RGB", (side, side))
    return image.convert("RGB")


def torchvision(file: BinaryIO) -> Image.Image:
    encoded = torch.frombuffer(bytearray(file.read()), dtype=torch.uint8)
    return Image.fromarray(decode_jpeg(encoded, ImageReadMode.RGB).permute(1, 2, 0).numpy())


def opencv(file: BinaryIO) -> Image.Image:
    encoded = np.frombuffer(file.read(), dtype=np.uint8)
    return Image.fromarray(cv2.imdecode(encoded, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION))


def decoders(side: int) -> dict[str, Decoder]:
    """All give what the transforms take, a Pillow image; ``side`` is that of the network's input in pixels."""
    return {
        "pillow": pillow,
        "pillow_draft": partial(pillow_draft, side),
        "torchvision": torchvision,
        "opencv": opencv,
    }


class DecodedImages(Images):
    """The training pictures, decoded in another way."""

    def __init__(self, dataset: Dataset, transform: Any, seed: int, decode: Decoder):
        super().__init__(dataset, transform, seed)
        self.decode = decode

    def _read(self, index: int) -> tuple[Image.Image, int]:
        file, label = self.dataset.reader[index]
        with file:
            return self.decode(file), int(label)


def measure(config: Config, processes: Processes, workers: int, images: int, rounds: int) -> dict[str, Any]:
    """Time the loader with each decoder, the decoders alone and the steps of the loader, in turns, ``rounds`` times.

    Args:
        workers: loader processes.
        images: pictures in a round, at most; the folder's number if it has fewer.

    Returns:
        dict: ``data``, ``settings``, ``workers``, ``images`` and ``batch`` of a round, ``rounds``; ``decoders``: of
        each, images/s of decoding alone and of the loader for each worker (medians with min and max), the latter
        relative to Pillow's in the same round, ``pixels`` compared with Pillow's; ``split_ms``: milliseconds that a
        picture takes in each step.

    Raises:
        InputError: no pictures, fewer than workers, or one that is not a JPEG or cannot be read.
    """
    dataset = open_split(config, config.train_split, workers, is_training=True)
    num_classes = count_classes(config, class_names(dataset))
    fresh = config.model_copy(update={"pretrained": False, "checkpoint": None})
    config = with_input_of(config, build_model(fresh, num_classes))
    batches = equal_batches(len(dataset), min(images, len(dataset)), config.device_batch, workers, config.seed)
    keys = [key for batch in batches for key in batch]
    files = read_jpegs(dataset, [index for _, index in keys])
    encoded = list(files.values())
    ways = decoders(config.img_size)
    pixels = {name: compare(files, decode) for name, decode in ways.items()}

    augment, options = transform(config, is_training=True), loader_options(processes, workers)
    loaders = {
        name: DataLoader(DecodedImages(dataset, augment, config.seed, decode), batch_sampler=batches, **options)
        for name, decode in ways.items()
        if decode is not pillow
    }
    loaders = {"pillow": train_loader(config, dataset, batches, processes, workers), **loaders}
    times: dict[str, list[dict[str, float]]] = {"decode": [], "loader": [], "split": []}
    try:
        for loader in loaders.values():  # starts the processes
            seconds_of_epoch(loader, num_classes)
        for _ in tqdm(range(rounds), unit="round", disable=None):
            epochs = {name: seconds_of_epoch(loader, num_classes) for name, loader in loaders.items()}
            times["loader"].append({name: len(keys) / seconds / workers for name, seconds in epochs.items()})
            alone = {name: seconds_of_decoding(encoded, decode) for name, decode in ways.items()}
            times["decode"].append({name: len(keys) / seconds for name, seconds in alone.items()})
            times["split"].append(split(loaders["pillow"].dataset, batches))
    finally:
        shut_down(*loaders.values())
    sizes = [Image.open(BytesIO(jpeg)).size for jpeg in encoded]
    return {
        "data": {
            "data_dir": config.data_dir,
            "split": config.train_split,
            "classes": num_classes,
            "images": len(dataset),
            "mean_width": statistics.mean(width for width, _ in sizes),
            "mean_height": statistics.mean(height for _, height in sizes),
            "mean_bytes": statistics.mean(map(len, encoded)),
        },
        "settings": config.model_dump(mode="json", include=INPUT_SETTINGS),
        "workers": workers,
        "images": len(keys),
        "batch": batches.device_batch,
        "rounds": rounds,
        "decoders": {
            name: {
                "decode_images_per_s": spread(times["decode"], name),
                "loader_images_per_s_per_worker": spread(times["loader"], name),
                "loader_relative_to_pillow": spread([{name: of[name] / of["pillow"]} for of in times["loader"]], name),
                "pixels": pixels[name],
            }
            for name in ways
        },
        "split_ms": {step: spread(times["split"], step) for step in times["split"][0]},
    }


def equal_batches(folder: int, images: int, device_batch: int, workers: int, seed: int) -> TrainBatches:
    """Batches of the ``folder``'s pictures, as large as ``device_batch`` allows, as many for each worker.

    Raises:
        InputError: fewer pictures than workers.
    """
    number = workers * math.ceil(images / device_batch / workers)
    if number > images:
        raise InputError(f"{images} images are too few for {workers} workers: give more --images or fewer --workers")
    batches = TrainBatches(folder, images // number, accumulation=1, rank=0, world=1, seed=seed)
    batches.steps = number  # not the whole folder
    return batches


def read_jpegs(dataset: Dataset, indices: list[int]) -> dict[str, bytes]:
    """The files by name.

    Raises:
        InputError: one is not a JPEG.
    """
    files = {}
    for index in indices:
        name = dataset.filename(index, absolute=True)
        with dataset.reader[index][0] as file:
            files[name] = file.read()
        if not files[name].startswith(b"\xff\xd8\xff"):
            raise InputError(f"{name} is not a JPEG, and decoders of JPEGs are compared: give a folder of JPEGs alone")
    return files


def compare(files: dict[str, bytes], decode: Decoder) -> dict[str, int]:
    """Pictures of another size than Pillow's, others of which pixels differ, and by how many of 255 levels at most.

    Raises:
        InputError: a picture cannot be decoded.
    """
    resized = differing = largest = 0
    for name, jpeg in files.items():
        try:
            expected, found = (np.asarray(decoder(BytesIO(jpeg))) for decoder in (pillow, decode))
        except Exception as error:  # decoders fail in their own ways
            raise InputError(f"{name} cannot be decoded ({type(error).__name__}): mend it or take it out") from error
        if expected.shape != found.shape:
            resized += 1
        elif not np.array_equal(expected, found):
            differing += 1
            largest = max(largest, int(np.abs(expected.astype(np.int16) - found).max()))
    return {"resized": resized, "differing": differing, "largest_difference": largest}


def seconds_of_epoch(loader: DataLoader, num_classes: int) -> float:
    start = time.perf_counter()
    for _ in checked(iter(loader), num_classes):
        pass
    return time.perf_counter() - start


def seconds_of_decoding(encoded: list[bytes], decode: Decoder) -> float:
    start = time.perf_counter()
    for jpeg in encoded:
        decode(BytesIO(jpeg))
    return time.perf_counter() - start


def split(images: Images, batches: TrainBatches) -> dict[str, float]:
    """Milliseconds that a picture takes in each step of the loader, in this process."""
    spent: Counter[str] = Counter()

    def timed(step: str, function: Callable, *arguments: Any) -> Any:
        start = time.perf_counter()
        result = function(*arguments)
        spent[step] += 1000 * (time.perf_counter() - start)
        return result

    def read(index: int) -> tuple[bytes, int]:
        file, label = images.dataset.reader[index]
        with file:
            return file.read(), label

    pictures = 0
    for batch in batches:
        samples = []
        for epoch, index in batch:
            timed("seed", seed_everything, images.seed, epoch, index)
            jpeg, label = timed("read", read, index)
            image = timed("decode", pillow, BytesIO(jpeg))
            for step in images.transform.transforms:
                name = type(step).__name__
                image = timed(STEPS.get(name, name), step, image)
            samples.append((image, label))
        timed("collate", collate, samples)
        pictures += len(samples)
    return {step: milliseconds / pictures for step, milliseconds in spent.items()}


def spread(rounds: list[dict[str, float]], name: str) -> dict[str, float]:
    values = [measured[name] for measured in rounds]
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def workers_needed(consume: float, images_per_s_per_worker: float) -> int:
    """Loader processes that keep up with devices taking ``consume`` images per second."""
    return math.ceil(consume / images_per_s_per_worker)


def report(record: dict[str, Any]) -> str:
    data, consume = record["data"], record["consume_images_per_s"]
    of = f" {'workers for ' + format(consume, ',g') + '/s':>22}" if consume else ""
    lines = [
        f"{record['images']} JPEGs of {data['mean_width']:.0f} x {data['mean_height']:.0f} pixels and "
        f"{data['mean_bytes'] / 1000:.0f} kB on average, to {record['settings']['img_size']} px; "
        f"--workers {record['workers']} on {record['hardware']['cores']} cores ({record['hardware']['cpu']}); "
        f"median of {record['rounds']} rounds (min to max)",
        "",
        f"  {'images/s':<16} {'decoding alone':>22} {'loader, each worker':>22} {'relative':>22}{of}  pixels",
    ]
    for name, measured in record["decoders"].items():
        keys = ("decode_images_per_s", "loader_images_per_s_per_worker")
        cells = [in_words(measured[key], ".0f") for key in keys]
        cells.append(in_words(measured["loader_relative_to_pillow"], ".2f"))
        cells += [f"{measured['workers_needed']:,}"] if consume else []
        row = "".join(f" {cell:>22}" for cell in cells)
        lines.append(f"  {name:<16}{row}  {differences(measured['pixels'])}")
    total = sum(spent["median"] for spent in record["split_ms"].values())
    lines += ["", f"  {'ms per picture':<16} {'in one process':>22} {'share':>22}"]
    for step, spent in record["split_ms"].items():
        lines.append(f"  {step:<16} {in_words(spent, '.2f'):>22} {spent['median'] / total:>22.0%}")
    lines += ["", "  pillow is the training loader itself; the others are the same loader with another decoder."]
    return "\n".join(lines)


def in_words(measured: dict[str, float], digits: str) -> str:
    median, low, high = (format(measured[key], digits) for key in ("median", "min", "max"))
    return f"{median} ({low} to {high})"


def differences(pixels: dict[str, int]) -> str:
    parts = []
    if pixels["resized"]:
        parts.append(f"{pixels['resized']} pictures of another size")
    if pixels["differing"]:
        parts.append(f"{pixels['differing']} pictures differ by up to {pixels['largest_difference']} of 255 levels")
    return ", ".join(parts) or "equal to Pillow's"


def main() -> None:
    parser = argparse.ArgumentParser(description="Images per second of the training loader and of JPEG decoders.")
    parser.add_argument("--data-dir", required=True, metavar="FOLDER", help="has train/CLASS/*.jpg")
    parser.add_argument("--config", default=str(CONFIGS / "poolformer_s12.yaml"), help="of classification/")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="loader processes")
    parser.add_argument("--images", type=int, default=500, metavar="N", help="pictures in a round")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="the median of so many is reported")
    parser.add_argument(
        "--consume", type=float, metavar="IMAGES_PER_S", help="what a node's devices take: tells the workers needed"
    )
    parser.add_argument("--record", type=Path, metavar="FILE", help="where the JSON record goes")
    arguments = parser.parse_args()
    for name in ("workers", "images", "rounds"):
        if getattr(arguments, name) < 1:
            raise InputError(f"--{name} is {getattr(arguments, name)}: give 1 or more")
    consume = arguments.consume
    if consume is not None and not 0 < consume < math.inf:
        raise InputError(f"--consume is {consume:g}: give the images per second that the devices take, above 0")
    folder = {"dataset": "", "data_dir": arguments.data_dir, "dataset_args": {}, "num_classes": None}
    config = load_config([arguments.config]).model_copy(update=folder)
    torch.set_num_threads(1)  # as in a loader's process
    cv2.setNumThreads(1)
    measured = measure(config, join(), arguments.workers, arguments.images, arguments.rounds)
    for of in measured["decoders"].values():
        per_worker = of["loader_images_per_s_per_worker"]["median"]
        of["workers_needed"] = None if consume is None else workers_needed(consume, per_worker)
    record = {
        "kind": "loader",
        "consume_images_per_s": consume,
        **measured,
        "libjpeg_turbo_of_pillow": features.version("libjpeg_turbo"),
        **provenance(),
    }
    if arguments.record:
        write_json(arguments.record, record)
    print(report(record))
