"""Checkpoints of mmengine, read with ``weights_only`` on: what it pickles besides tensors is allowed by name."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dist import get_rank, is_distributed
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader
from torch import distributed, nn

from metaformer.errors import InputError
from metaformer.formats import StateDict
from metaformer.mm.backbone import MetaFormerBackbone, rename_official
from metaformer.weights import differences, fetch, listed, read_checkpoint


def attribute_of_history(owner: type, name: str) -> Any:
    """Stands for ``getattr`` in a checkpoint, where mmengine needs it for its history's methods and nothing else."""
    if owner is not HistoryBuffer:
        raise pickle.UnpicklingError(f"GLOBAL getattr({owner!r}, {name!r})")
    return getattr(owner, name)


make_array, make_scalar = np.zeros(1).__reduce__()[0], np.float64(0).__reduce__()[0]
torch.serialization.add_safe_globals(
    [
        HistoryBuffer,
        (attribute_of_history, "builtins.getattr"),
        np.ndarray,
        np.dtype,
        *(type(np.dtype(kind)) for kind in ("float64", "float32", "int64", "int32", "bool")),
        # NumPy 2 writes numpy._core, NumPy 1 wrote numpy.core.
        *((make_array, f"numpy.{core}.multiarray._reconstruct") for core in ("_core", "core")),
        *((make_scalar, f"numpy.{core}.multiarray.scalar") for core in ("_core", "core")),
    ]
)


@CheckpointLoader.register_scheme(prefixes="", force=True)
def load_from_local(filename: str, map_location: Any = None) -> dict:
    """In place of mmengine's: errors as one sentence. Tensors stay on the CPU; who loads them copies them."""
    return read(Path(filename).expanduser())


@CheckpointLoader.register_scheme(prefixes=("http://", "https://"), force=True)
def load_from_http(filename: str, map_location: Any = None, model_dir: str | None = None) -> dict:
    """In place of mmengine's, which reads downloads with ``weights_only`` off. The first process fetches."""
    if get_rank() == 0:
        fetch(filename, model_dir)
    if is_distributed():
        distributed.barrier()
    return read(fetch(filename, model_dir))  # fetched on the other machines, where they share no file system


def read(path: Path) -> dict:
    checkpoint = read_checkpoint(path)
    if isinstance(checkpoint.get("meta"), dict):
        # Of old versions: mmengine would execute it as Python, to learn how many GPUs there were.
        checkpoint["meta"].pop("config", None)
    return checkpoint


def weights_for(model: nn.Module, checkpoint: dict) -> StateDict:
    """The weights in a checkpoint of a detector or segmentor, the official ones too, under the names of ``model``."""
    weights = {
        name.removeprefix("module."): tensor for name, tensor in checkpoint.get("state_dict", checkpoint).items()
    }
    for name, module in model.named_modules():
        if isinstance(module, MetaFormerBackbone):
            rename_official(module, weights, f"{name}.")
    return weights


def check_weights(model: nn.Module, weights: StateDict, source: str, part: str = "") -> None:
    """Raise unless ``weights`` has each tensor of ``model`` (those under ``part``) in its shape, and no other.

    mmengine itself loads what fits and goes on with random numbers in place of the rest.

    Raises:
        InputError: with the names that differ.
    """
    own = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(part)}
    given = {name: tensor for name, tensor in weights.items() if name.startswith(part)}
    problems = differences(own, given)
    if any(problems.values()):
        raise InputError(f"{source} holds another model than the config builds: {listed(problems)}")
