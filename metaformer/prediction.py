"""Predict the most likely classes of pictures."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from timm.data import ImageNetInfo
from torch.utils.data import Dataset

from metaformer.errors import InputError
from metaformer.training.batches import Unreadable, checked
from metaformer.training.distributed import join
from metaformer.training.evaluation import outputs
from metaformer.training.loader import loader_processes, val_loader
from metaformer.training.model import settings_of
from metaformer.weights import Opened

Prediction = dict[str, Any]


class Pictures(Dataset):
    """Index to (picture, turned upright as its EXIF data says, index)."""

    def __init__(self, paths: list[Path]):
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        with Image.open(self.paths[index]) as picture:
            return ImageOps.exif_transpose(picture), index

    def filename(self, index: int, absolute: bool) -> str:
        return str(self.paths[index])


def find_pictures(given: list[Path]) -> list[Path]:
    """The given files, and all files below the given folders that have the suffix of a picture format, in order.

    Raises:
        InputError: a file does not exist, or a folder contains no picture.
    """
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    found = []
    for path in given:
        if path.is_dir():
            files = (Path(folder, name) for folder, _, names in os.walk(path, followlinks=True) for name in names)
            inside = sorted(file for file in files if file.suffix.lower() in suffixes)
            if not inside:
                raise InputError(f"there are no pictures in {path}")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise InputError(f"there is no picture or folder {path}")
    return found


def names_of(opened: Opened) -> list[str]:
    """Class names of the checkpoint. Without them, ImageNet's names for 1,000 classes, and numbers otherwise."""
    classes = opened.model.num_classes
    if opened.class_names:
        return opened.class_names
    return ImageNetInfo().label_descriptions() if classes == 1000 else [str(i) for i in range(classes)]


@torch.inference_mode()
def predict(
    opened: Opened, paths: list[Path], top: int = 5, batch: int = 32, progress: Callable[[Iterable], Iterable] = iter
) -> tuple[list[Prediction], list[Unreadable]]:
    """The ``top`` classes of each readable picture with their probabilities, and the unreadable pictures."""
    processes, names = join(), names_of(opened)
    overrides = {"device_batch": batch, "data_in_memory": False}
    if processes.device.type == "cpu":
        overrides["precision"] = "float32"  # a run on a GPU may have used one that a CPU does not have
    config = settings_of(opened, overrides)
    workers = min(processes.default_workers(), len(paths) // batch)
    loader = val_loader(config, Pictures(paths), processes, workers)
    model = opened.model.to(processes.device)
    predictions, unreadable = [], []
    batches = checked(progress(loader), len(paths), unreadable)
    with loader_processes(loader):
        for logits, indices in outputs(model, batches, config, processes.device):
            probabilities, classes = logits.softmax(1).topk(min(top, len(names)))
            for index, *best in zip(indices.tolist(), probabilities.tolist(), classes.tolist(), strict=True):
                best = [{"class": names[i], "index": i, "probability": p} for p, i in zip(*best, strict=True)]
                predictions.append({"file": str(paths[index]), "classes": best})
    return predictions, unreadable
