"""Training and validation pictures as batches of uint8 images, the same on any number of devices.

All that is random about a training picture follows from the seed, the epoch and the picture. A run therefore does not
depend on the number of loader processes or devices, and an interrupted run continues as it would have gone on.
"""

import random
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Sampler, default_collate
from torchvision.datasets import DatasetFolder

from metaformer.errors import InputError
from metaformer.training.config import Config


class Unreadable(NamedTuple):
    """Stands for a picture that could not be read or transformed, until the main process reports it."""

    name: str
    reason: str


def unreadable(name: str, error: Exception) -> Unreadable:
    return Unreadable(printable(name), printable(f"{type(error).__name__}: {error}"))


class Batch(NamedTuple):
    """Images uint8 (B, 3, H, W) and labels (B,) of the pictures that could be read, perhaps none, and the others."""

    images: Tensor
    labels: Tensor
    unreadable: list[Unreadable]


def seed_everything(*entropy: int) -> None:
    """Seed Python, NumPy and torch (this process's devices) from some numbers, such as (seed, epoch, step)."""
    state = np.random.SeedSequence(entropy).generate_state(3)
    random.seed(int(state[0]))
    np.random.seed(state[1])
    torch.default_generator.manual_seed(int(state[2]))
    if torch.cuda.is_initialized():  # otherwise torch.manual_seed would queue a call each time, with a stack trace
        torch.cuda.manual_seed(int(state[2]))


class TrainBatches(Sampler):
    """Passes of one device, each a list of (epoch, index), for the epoch and from the optimizer step set before.

    The pictures of an optimizer step are consecutive in the epoch's order and cut into passes of ``device_batch``; the
    devices take them in turn. The passes are therefore the same for any number of devices.
    """

    def __init__(self, images: int, device_batch: int, accumulation: int, rank: int, world: int, seed: int):
        self.images, self.device_batch, self.seed = images, device_batch, seed
        self.passes = [turn * world + rank for turn in range(accumulation)]
        self.steps = images // (device_batch * accumulation * world)
        self.global_batch = device_batch * accumulation * world
        self.epoch = self.first_step = 0

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.images)
        for step in range(self.first_step, self.steps):
            for number in self.passes:
                start = step * self.global_batch + number * self.device_batch
                yield [(self.epoch, int(index)) for index in order[start : start + self.device_batch]]


class Images(Dataset):
    """(epoch, index) to (uint8 tensor (3, H, W), label).

    Args:
        seed: what the transform draws follows from (seed, epoch, index); ``None`` if it draws nothing, so that the
            global random state is left alone.
    """

    def __init__(self, dataset: Dataset, transform: Any, seed: int | None = None):
        self.dataset, self.transform, self.seed = dataset, transform, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int] | Unreadable:
        epoch, index = key
        if self.seed is not None:
            seed_everything(self.seed, epoch, index)
        try:
            image, label = self._read(index)
            return self.transform(image), label
        except Exception as error:  # decoders fail in their own ways; the batch carries the failure to the main process
            return unreadable(self.name(index), error)

    def _read(self, index: int) -> tuple[Image.Image, int]:
        if hasattr(self.dataset, "reader"):  # not by timm's ImageDataset, which replaces unreadable pictures
            file, label = self.dataset.reader[index]
            with file:
                return to_rgb(Image.open(file)), int(label)
        image, label = self.dataset[index]
        return to_rgb(image), int(label)

    def name(self, index: int) -> str:
        if isinstance(self.dataset, DatasetFolder):
            return self.dataset.samples[index][0]
        named = hasattr(self.dataset, "filename") and self.dataset.filename(index, absolute=True)
        return named or f"number {index}"  # pictures inside a Hugging Face data set may have no name


class Stream(IterableDataset):
    """(uint8 tensor (3, H, W), label) of each picture of a stream, in its order."""

    def __init__(self, dataset: IterableDataset, transform: Any):
        self.dataset, self.transform = dataset, transform
        self.errors: list[Exception] = []

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[tuple[Tensor, int] | Unreadable]:
        for number, picture in enumerate(self._pictures()):
            try:
                if picture:
                    yield self.transform(to_rgb(picture[0])), picture[1]
            except Exception as error:  # as in Images
                self.errors.append(error)
            while self.errors:
                yield unreadable(f"number {number} of a stream", self.errors.pop())

    def _pictures(self) -> Iterator[tuple[Image.Image, int] | None]:
        """What timm's reader gives, and ``None`` at the end; its errors go to ``self.errors``."""
        from timm.data.readers import reader_wds  # imports webdataset

        reader_wds.log_and_continue = self._note  # it would leave out such pictures; the call is in this process
        try:
            yield from self.dataset
        except Exception as error:
            self.errors.append(error)
        yield None

    def _note(self, error: Exception) -> bool:
        self.errors.append(error)
        return True  # continue with the next picture


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert to 8-bit RGB. 16-bit greys keep their upper 8 bits; Pillow would make all values above 255 white.

    Raises:
        ValueError: the picture has a mode in which the value of white is not defined.
    """
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode}, in which the value of white is not defined")
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")  # convert would copy an RGB picture


def printable(text: str) -> str:
    """The text on one line; a file name may contain line breaks."""
    return text if text.isprintable() else repr(text)


def collate(samples: list) -> Batch:
    """Stack tensors (3, H, W) to a batch in channels-last layout, in which Pillow keeps its pixels."""
    readable = [(sample[0].movedim(0, 2), sample[1]) for sample in samples if not isinstance(sample, Unreadable)]
    unreadable = [sample for sample in samples if isinstance(sample, Unreadable)]
    if not readable:
        return Batch(torch.empty(0), torch.empty(0, dtype=torch.int64), unreadable)
    images, labels = default_collate(readable)  # in a loader process, straight into shared memory
    return Batch(images.movedim(3, 1), labels, unreadable)


def checked(batches: Iterable[Batch], num_classes: int, skipped: list | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and labels, unless a label is out of range.

    Args:
        skipped: takes the :class:`Unreadable` that are left out of a batch; without it, the first one stops the run.
    """
    for images, labels, unreadable in batches:
        if unreadable and skipped is None:
            name, reason = unreadable[0]
            raise InputError(
                f"cannot use the picture {name} ({reason}): repair it, remove it, or leave out all such pictures with "
                "bad_pictures=skip"
            )
        if unreadable:
            skipped.extend(unreadable)
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
            wrong = next(label for label in labels.tolist() if not 0 <= label < num_classes)
            raise InputError(f"the data have a label {wrong}, but num_classes is {num_classes}")
        yield images, labels


def transform(config: Config, is_training: bool) -> Any:
    """timm's ImageNet transforms up to the uint8 tensor; normalisation and erasing follow on the device."""
    options = {"interpolation": config.interpolation, "crop_pct": config.crop_pct}
    if is_training:
        options = config.model_dump(include={"scale", "ratio", "hflip", "vflip", "auto_augment", "mean", "std"})
        options |= {"color_jitter": config.color_jitter or None, "interpolation": config.train_interpolation}
    try:
        return create_transform(config.img_size, is_training=is_training, use_prefetcher=True, **options)
    except (AssertionError, KeyError, ValueError) as error:
        raise InputError(f"timm has no such augmentation: auto_augment={config.auto_augment} ({error})") from error
