"""Whole data sets in memory: pictures decoded once for all runs, and augmented as batches on the device."""

import hashlib
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
import timm
import torch
from safetensors.torch import save
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from metaformer.errors import InputError
from metaformer.provenance import write_file
from metaformer.training.augmentation import augment
from metaformer.training.batches import Batch, Images, Unreadable, printable
from metaformer.training.checkpoints import locked
from metaformer.training.config import Config
from metaformer.weights import read_checkpoint


class Pictures(NamedTuple):
    """A whole data set: images uint8 (N, 3, H, W) and labels int64 (N,)."""

    images: Tensor
    labels: Tensor


class InMemory(Dataset):
    """Lists of (epoch, index) to batches; the pictures are in the memory of a device.

    The random numbers of the augmentation follow from the seed, the epoch and the first picture of the batch.

    Args:
        config: settings of the augmentation; ``None`` for pictures as they are.
    """

    def __init__(self, pictures: Pictures, device: torch.device, config: Config | None = None):
        # Labels stay on the CPU, where batches.checked looks at them without waiting for a GPU.
        self.images, self.labels, self.config = pictures.images.to(device), pictures.labels, config

    def __getitems__(self, keys: list[tuple[int, int]]) -> Batch:  # DataLoader calls this once per batch
        epochs, indices = map(list, zip(*keys, strict=True))
        images = self.images[indices]
        if self.config:
            images = augment(self.config, images, np.random.default_rng([self.config.seed, epochs[0], indices[0]]))
        return Batch(images, self.labels[indices], [])


def load_pictures(dataset: Dataset, transform: Any, options: dict[str, Any]) -> Pictures:
    """All pictures after ``transform``; those of a folder are kept in PyTorch's cache folder for other runs.

    Args:
        transform: maps a PIL image to a uint8 array or tensor (3, H, W); its ``repr`` identifies it in the cache.
        options: of the DataLoader that reads the pictures.

    Raises:
        InputError: the data set is a stream, or a picture cannot be read or has another size than the first.
    """
    if isinstance(dataset, IterableDataset):
        raise InputError("data_in_memory=true needs a data set whose pictures can be counted, and this is a stream")
    path = kept_at(dataset, transform)
    if path is None:
        return decode(dataset, transform, options)
    with locked(path.parent, wait=True):  # the first of several processes decodes, and the others wait for its file
        if not path.is_file():
            pictures = decode(dataset, transform, options)
            write_file(path, save(pictures._asdict()))
    return Pictures(**read_checkpoint(path))


def kept_at(dataset: Dataset, transform: Any) -> Path | None:
    """The file for the pictures of a folder, named after all that they depend on; ``None`` for other data sets."""
    reader = getattr(dataset, "reader", None)
    if not isinstance(reader, ReaderImageFolder):
        return None
    key = hashlib.sha256(f"{transform} timm {timm.__version__} Pillow {PIL.__version__}\n".encode())
    for path, label in reader.samples:
        try:
            status = os.stat(path)
        except OSError:  # decoding then raises an error that names the picture
            return None
        key.update(os.fsencode(path) + f" {label} {status.st_size} {status.st_mtime_ns}\n".encode())
    return Path(torch.hub.get_dir()) / "metaformer" / f"pictures-{key.hexdigest()[:16]}.safetensors"


def decode(dataset: Dataset, transform: Any, options: dict[str, Any]) -> Pictures:
    images = Images(dataset, transform)
    keys = [(0, index) for index in range(len(dataset))]
    options = {**options, "persistent_workers": False, "collate_fn": as_arrays}
    pictures, labels = None, np.empty(len(dataset), dtype=np.int64)
    samples = (sample for batch in DataLoader(images, 256, sampler=keys, **options) for sample in batch)
    for index, sample in enumerate(samples):
        if isinstance(sample, Unreadable):
            name, reason = sample
            raise InputError(f"data_in_memory=true needs readable pictures, and {name} is not ({reason}): take it out")
        pixels, labels[index] = sample
        if pictures is None:
            pictures = np.empty((len(dataset), *pixels.shape), dtype=np.uint8)
        if pixels.shape != pictures.shape[1:]:
            (height, width), (usual_height, usual_width) = pixels.shape[1:], pictures.shape[2:]
            raise InputError(
                f"data_in_memory=true needs pictures of one size, and {printable(images.name(index))} has "
                f"{width} x {height} pixels instead of {usual_width} x {usual_height}: resize it"
            )
        pictures[index] = pixels
    return Pictures(torch.from_numpy(pictures), torch.from_numpy(labels))


def as_arrays(samples: list) -> list:
    """NumPy arrays, because each tensor that a loader process sends takes a file descriptor."""
    return [each if isinstance(each, Unreadable) else (np.asarray(each[0]), each[1]) for each in samples]
