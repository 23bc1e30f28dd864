"""A hash of the files of a data set, for the records."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from torch.utils.data import Dataset, IterableDataset
from torchvision.datasets import DatasetFolder


def fingerprint(dataset: Dataset) -> str | None:
    """SHA-256 over the names and sizes in bytes of a split's pictures, wherever they lie; their contents are not read.

    A folder and a tar of it have the same hash. For a folder that holds only pictures, it is the output of
    ``find -L . -type f -printf '%P %s\\n' | LC_ALL=C sort | sha256sum``. For WebDataset, the files are the shards. A
    file that cannot be looked up counts with size -1. Returns ``None`` for data sets that do not list their files, such
    as Hugging Face's.
    """
    lines = sorted(b"%b %d\n" % (os.fsencode(name), size) for name, size in files(dataset))
    return hashlib.sha256(b"".join(lines)).hexdigest() if lines else None


def files(dataset: Dataset) -> Iterator[tuple[str, int]]:
    """Names relative to the split, and sizes."""
    reader = getattr(dataset, "reader", dataset)
    if isinstance(reader, ReaderImageFolder | DatasetFolder):
        start = len(os.path.join(reader.root, ""))
        for path, _ in reader.samples:
            yield path[start:], size(path)
    elif isinstance(reader, ReaderImageInTar):
        for member, tar, inner in reader.samples:
            yield os.path.normpath("/".join([*filter(None, (tar, inner and inner.name)), member.name])), member.size
    elif isinstance(dataset, IterableDataset):
        from timm.data.readers.reader_wds import ReaderWds  # imports webdataset

        for name in reader.split_info.filenames if isinstance(reader, ReaderWds) else ():
            yield Path(name).name, size(os.path.join(reader.root, name))


def size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:  # a link to nowhere or a URL; reading it fails with the picture's name
        return -1
