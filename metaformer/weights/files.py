"""Read checkpoint files without executing anything in them, and fetch released ones."""

import argparse
import hashlib
import os
import pickle
import sys
import zipfile
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from timm.models._hub import download_cached_file, get_cache_dir

from metaformer.errors import InputError

HF_FILES = ("model.safetensors", "pytorch_model.bin")
IN_FOLDERS = ("best.pt", "model_best.pth.tar", *HF_FILES)
"""Names of the checkpoint in a folder: of a run, of a run of timm's train.py, and of a Hugging Face model."""

make_array, make_scalar = np.zeros(1).__reduce__()[0], np.float64(0).__reduce__()[0]
PLAIN_DATA = [
    argparse.Namespace,  # timm's train.py saves its arguments
    np.ndarray,
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("float64", "float32", "int64", "int32", "bool")),
    # NumPy 2 writes numpy._core, NumPy 1 wrote numpy.core.
    *((make_array, f"numpy.{core}.multiarray._reconstruct") for core in ("_core", "core")),
    *((make_scalar, f"numpy.{core}.multiarray.scalar") for core in ("_core", "core")),
]
"""Classes and functions that a checkpoint may contain besides those that ``torch.load(weights_only=True)`` allows."""


class History:
    """Stands in for mmengine's ``HistoryBuffer`` while mmengine is not imported."""


def history_of_mmengine() -> list[tuple[Any, str]]:
    """What mmengine pickles: its history of losses, and ``getattr``, here limited to the methods of that class."""
    mmengine = sys.modules.get("mmengine.logging")
    kind = mmengine.HistoryBuffer if mmengine else History

    def method(owner: type, name: str) -> Any:
        if owner is not kind or name.startswith("_"):
            raise pickle.UnpicklingError(f"GLOBAL getattr({owner!r}, {name!r})")
        return getattr(owner, name, None)

    return [(kind, "mmengine.logging.history_buffer.HistoryBuffer"), (method, "builtins.getattr")]


def locate(source: str | Path) -> Path:
    """The checkpoint file that ``source`` names: a file, or a folder that holds one of :data:`IN_FOLDERS`.

    Raises:
        InputError: there is none.
    """
    path = Path(source)
    if found := next((file for file in (path, *map(path.joinpath, IN_FOLDERS)) if os.path.isfile(file)), None):
        return found
    if os.path.isdir(path):
        if (path / "model.safetensors.index.json").is_file():
            raise InputError(f"{path} has its weights in several files: save it again with a larger max_shard_size")
        raise InputError(f"there is no checkpoint in {path}: expected a file {' or '.join(IN_FOLDERS)} there")
    raise InputError(f"there is no checkpoint {path}: give a checkpoint file or the folder of a run or model")


def read_checkpoint(source: str | Path) -> dict:
    """Read a checkpoint onto the CPU without executing anything in the file (``weights_only``).

    Args:
        source: a file of ``torch.save``, one of safetensors under any name, or a folder as for :func:`locate`.

    Raises:
        InputError: the file is missing, damaged, not a checkpoint, or contains more than tensors and plain data.
    """
    path = locate(source)
    try:
        with path.open("rb") as file:
            begins = file.read(9)
    except OSError as error:  # later ones are of damaged files: zipfile seeks to where there is nothing
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    try:
        if begins[8:] == b"{":  # the length of safetensors' JSON header, and its beginning
            return load_file(path)
        if zipfile.is_zipfile(path):  # torch.load ignores checksums, which the format of PyTorch before 1.6 lacks
            with zipfile.ZipFile(path) as file:
                if file.testzip() or any(record.compress_type for record in file.infolist()):
                    raise zipfile.BadZipFile(path)
        there = torch.serialization.get_safe_globals()  # safe_globals would take these away when it ends
        allowed = [each for each in PLAIN_DATA + history_of_mmengine() if each not in there]
        with torch.serialization.safe_globals(allowed):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a file that is not a checkpoint makes the unpickler fail in any way
        says = "is not a checkpoint or is damaged: get or save it again"
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):  # a class or function
            says = (
                "holds more than tensors and plain data, and reading it could run code: ask its author for a file of "
                "weights only"
            )
        raise InputError(f"{path} {says}") from error
    if not isinstance(checkpoint, dict):
        raise InputError(f"{path} holds a {type(checkpoint).__name__}, not the weights of a model")
    return checkpoint


def fetch(url: str, cache_dir: str | Path | None = None) -> Path:
    """Download the file at ``url`` into ``cache_dir``, by default PyTorch's, unless it is there already.

    Raises:
        InputError: the file cannot be fetched, is damaged or is not a checkpoint. It is then removed from the cache.
    """
    try:
        # A folder for each address, since many have a file epoch_12.pth; and not every number in a name is a hash.
        folder = Path(cache_dir or get_cache_dir(), hashlib.sha256(url.encode()).hexdigest()[:8])
        path = Path(download_cached_file(url, check_hash=False, progress=os.isatty(2), cache_dir=folder))
    except (OSError, HTTPException) as error:
        raise InputError(f"cannot fetch {url} ({error}): fetch it elsewhere and name the file as checkpoint") from error
    try:
        read_checkpoint(path)
    except InputError:
        path.unlink(missing_ok=True)
        raise
    return path
