"""Throughput of the training loader."""

import math
import statistics
import time
from typing import Any

from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from metaformer.errors import InputError
from metaformer.training.batches import TrainBatches, checked, to_rgb
from metaformer.training.config import Config
from metaformer.training.data import class_names, count_classes, open_split
from metaformer.training.distributed import join
from metaformer.training.loader import loader_processes, train_loader
from metaformer.training.model import build_model, with_input_of


def measure(config: Config, workers: int, images: int, rounds: int) -> dict[str, Any]:
    """Measure the loader and return a record (:class:`metaformer.records.Loading`) without its provenance.

    Args:
        workers: number of loader processes.
        images: largest number of pictures in a round.

    Raises:
        InputError: there are no pictures, fewer pictures than workers, or a picture cannot be read.
    """
    dataset = open_split(config, config.train_split, workers, is_training=True)
    num_classes = count_classes(config, class_names(dataset))
    fresh = config.model_copy(update={"pretrained": False, "checkpoint": None})
    config = with_input_of(config, build_model(fresh, num_classes))
    batches = equal_batches(len(dataset), min(images, len(dataset)), config.device_batch, workers, config.seed)
    loader = train_loader(config, dataset, batches, join(), workers)
    indices = [index for batch in batches for _, index in batch]
    rates, decoding = [], []
    with loader_processes(loader):
        seconds_of_epoch(loader, num_classes)  # starts the processes
        for _ in tqdm(range(rounds), unit="round", disable=None):
            rates.append(len(indices) / seconds_of_epoch(loader, num_classes) / workers)
            start = time.perf_counter()
            sizes = [decoded(dataset, index) for index in indices]
            decoding.append(len(indices) / (time.perf_counter() - start))
    width, height, size = map(statistics.mean, zip(*sizes, strict=True))
    means = {"mean_width": width, "mean_height": height, "mean_bytes": size}
    return {
        "kind": "loader",
        "data": {"data_dir": config.data_dir, "classes": num_classes, "images": len(dataset), **means},
        "settings": config.model_dump(mode="json"),
        "workers": workers,
        "images": len(indices),
        "batch": batches.device_batch,
        "rounds": rounds,
        "decoders": {
            "pillow": {"decode_images_per_s": spread(decoding), "loader_images_per_s_per_worker": spread(rates)}
        },
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


def decoded(dataset: Dataset, index: int) -> tuple[int, int, int]:
    """Decode a picture; returns its width and height in pixels and its size in bytes."""
    file, _ = dataset.reader[index]
    with file:
        return *to_rgb(Image.open(file)).size, file.seek(0, 2)


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}
