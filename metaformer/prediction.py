"""The most likely classes of pictures."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import ImageNetInfo
from timm.data.loader import fast_collate
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from metaformer.errors import InputError
from metaformer.training.batches import Unreadable, printable, to_rgb, transform
from metaformer.training.config import Config
from metaformer.training.distributed import join
from metaformer.training.model import autocast, normaliser, settings_of
from metaformer.weights import Opened

Prediction = dict[str, Any]


class Pictures(Dataset):
    """Index to (index, uint8 array (3, H, W)), turned upright as the picture's EXIF data says."""

    def __init__(self, paths: list[Path], config: Config):
        self.paths, self.transform = paths, transform(config, is_training=False)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[int, np.ndarray] | Unreadable:
        try:
            with Image.open(self.paths[index]) as picture:
                return index, self.transform(to_rgb(ImageOps.exif_transpose(picture)))
        except Exception as error:  # decoders fail in their own ways; the batch carries the failure to the main process
            return Unreadable(printable(str(self.paths[index])), printable(f"{type(error).__name__}: {error}"))


def collate(samples: list) -> tuple[list[int], Tensor | None, list[Unreadable]]:
    read = [sample for sample in samples if not isinstance(sample, Unreadable)]
    images = fast_collate([(image, 0) for _, image in read])[0] if read else None
    return [index for index, _ in read], images, [sample for sample in samples if isinstance(sample, Unreadable)]


def find_pictures(given: list[Path]) -> list[Path]:
    """The given files, and the files in and below the given folders whose suffix is one of a picture, in order.

    Raises:
        InputError: there is no such file, or no picture in a folder.
    """
    Image.init()
    suffixes = {suffix for suffix, kind in Image.EXTENSION.items() if kind in Image.OPEN}
    found = []
    for path in given:
        if path.is_dir():
            inside = [file for file in sorted(path.rglob("*")) if file.suffix.lower() in suffixes and file.is_file()]
            if not inside:
                raise InputError(f"there are no pictures in {path}")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise InputError(f"there is no picture or folder {path}")
    return found


def names_of(opened: Opened) -> list[str]:
    """The names of the classes; ImageNet's for 1,000 classes without names, and otherwise numbers."""
    classes = opened.model.num_classes
    if opened.class_names:
        return opened.class_names
    return ImageNetInfo().label_descriptions() if classes == 1000 else [str(i) for i in range(classes)]


@torch.inference_mode()
def predict(
    opened: Opened, paths: list[Path], top: int = 5, batch: int = 32, progress: Callable[[Iterable], Iterable] = iter
) -> tuple[list[Prediction], list[Unreadable]]:
    """The ``top`` classes with their probabilities for each picture that can be read, and the other pictures."""
    processes, config, names = join(), settings_of(opened), names_of(opened)
    workers = min(processes.default_workers(), len(paths) // batch)
    loader = DataLoader(Pictures(paths, config), batch, num_workers=workers, collate_fn=collate)
    model = opened.model.to(processes.device)
    normalise = normaliser(config, processes.device)
    predictions, unreadable = [], []
    for indices, images, failed in progress(loader):
        unreadable += failed
        if images is None:
            continue
        with autocast(config, processes.device):
            logits = model(normalise(images))
        probabilities, classes = logits.float().softmax(1).topk(min(top, len(names)))
        for index, shares, labels in zip(indices, probabilities.tolist(), classes.tolist(), strict=True):
            best = [{"class": names[i], "index": i, "probability": p} for i, p in zip(labels, shares, strict=True)]
            predictions.append({"file": str(paths[index]), "classes": best})
    return predictions, unreadable
