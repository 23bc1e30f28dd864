"""Throughput of the training loader, and the time that each of its steps takes."""

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable
from io import BytesIO
from typing import Any, BinaryIO

from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm

from metaformer.errors import InputError
from metaformer.training.batches import Images, TrainBatches, checked, collate, seed_everything, to_rgb
from metaformer.training.config import Config
from metaformer.training.data import class_names, count_classes, open_split
from metaformer.training.distributed import Processes
from metaformer.training.loader import shut_down, train_loader
from metaformer.training.model import build_model, with_input_of

STEPS = {
    "RandomResizedCropAndInterpolation": "crop and resize",
    "RandomHorizontalFlip": "flip",
    "MaybePILToTensor": "to tensor",
}
"""Names of timm's transforms in the record; others are called by their class."""
INPUT_SETTINGS = {
    *("img_size", "scale", "ratio", "hflip", "vflip", "train_interpolation", "auto_augment", "color_jitter", "seed"),
    *("mean", "std"),  # RandAugment fills with the mean
}


def measure(
    config: Config, processes: Processes, workers: int, images: int, rounds: int, consume: float | None = None
) -> dict[str, Any]:
    """The record of a measurement (:class:`metaformer.records.Loading`), without its provenance.

    Args:
        workers: processes of the loader.
        images: pictures in a round, at most; all of the folder if it has fewer.
        consume: images/s that a node's devices take, to be divided by the speed of a worker.

    Raises:
        InputError: no pictures, fewer than workers, or one that cannot be read.
    """
    dataset = open_split(config, config.train_split, workers, is_training=True)
    num_classes = count_classes(config, class_names(dataset))
    fresh = config.model_copy(update={"pretrained": False, "checkpoint": None})
    config = with_input_of(config, build_model(fresh, num_classes))
    batches = equal_batches(len(dataset), min(images, len(dataset)), config.device_batch, workers, config.seed)
    loader = train_loader(config, dataset, batches, processes, workers)
    number = sum(len(batch) for batch in batches)
    speeds, decoding, steps = [], [], []
    try:
        seconds_of_epoch(loader, num_classes)  # starts the processes
        for _ in tqdm(range(rounds), unit="round", disable=None):
            speeds.append(number / seconds_of_epoch(loader, num_classes) / workers)
            steps.append(split(loader.dataset, batches))
            decoding.append(1000 / steps[-1]["decode"])
    finally:
        shut_down(loader)
    speed = spread(speeds)
    files = (dataset.reader[index][0] for batch in batches for _, index in batch)
    return {
        "kind": "loader",
        "data": {"data_dir": config.data_dir, "classes": num_classes, "images": len(dataset), **sizes(files)},
        "settings": config.model_dump(mode="json", include=INPUT_SETTINGS),
        "workers": workers,
        "images": number,
        "batch": batches.device_batch,
        "rounds": rounds,
        "consume_images_per_s": consume,
        "decoders": {
            "pillow": {
                "decode_images_per_s": spread(decoding),
                "loader_images_per_s_per_worker": speed,
                "loader_relative_to_pillow": spread([1.0]),
                "workers_needed": None if consume is None else math.ceil(consume / speed["median"]),
            }
        },
        "split_ms": {step: spread([of[step] for of in steps]) for step in steps[0]},
    }


def equal_batches(folder: int, images: int, device_batch: int, workers: int, seed: int) -> TrainBatches:
    """Batches of the ``folder``'s pictures, as large as ``device_batch`` allows, and as many for each worker.

    Raises:
        InputError: fewer pictures than workers.
    """
    number = workers * math.ceil(images / device_batch / workers)
    if number > images:
        raise InputError(f"{images} images are too few for {workers} workers: give more --images or fewer --workers")
    batches = TrainBatches(folder, images // number, accumulation=1, rank=0, world=1, seed=seed)
    batches.steps = number  # not the whole folder
    return batches


def seconds_of_epoch(loader: DataLoader, num_classes: int) -> float:
    start = time.perf_counter()
    for _ in checked(iter(loader), num_classes):
        pass
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
            encoded, label = timed("read", read, index)
            image = timed("decode", lambda file: to_rgb(Image.open(file)), BytesIO(encoded))
            for step in images.transform.transforms:
                name = type(step).__name__
                image = timed(STEPS.get(name, name), step, image)
            samples.append((image, label))
        timed("collate", collate, samples)
        pictures += len(samples)
    return {step: milliseconds / pictures for step, milliseconds in spent.items()}


def sizes(files: Iterable[BinaryIO]) -> dict[str, float]:
    """Mean width and height in pixels, and mean size in bytes, of opened pictures; closes them."""
    found = []
    for file in files:
        with file, Image.open(file) as picture:
            found.append((*picture.size, file.seek(0, 2)))
    means = map(statistics.mean, zip(*found, strict=True))
    return dict(zip(("mean_width", "mean_height", "mean_bytes"), means, strict=True))


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}
