"""Weights in: read a checkpoint safely, and load it or say exactly why not. As a command, weights out."""

import os
import pickle
import sys
import zipfile
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlparse

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from metaformer.errors import InputError
from metaformer.formats import FROM, StateDict, recognised
from metaformer.model import MetaFormer

HF_FILES = ("model.safetensors", "pytorch_model.bin")


def read_checkpoint(path: str | Path) -> dict:
    """What is in a checkpoint, on the CPU; nothing in the file is executed (``weights_only``).

    Args:
        path: a file of ``torch.save``, a ``.safetensors`` file, or a Hugging Face folder with one of them.

    Raises:
        InputError: no such file, damaged or no checkpoint at all, or one that holds more than tensors and plain data.
    """
    path = Path(path)
    if path.is_dir():
        files = [path / name for name in HF_FILES if (path / name).is_file()]
        if not files:
            raise InputError(f"there is no checkpoint in {path}: give a file, or a folder with {' or '.join(HF_FILES)}")
        path = files[0]
    if not path.is_file():
        raise InputError(f"there is no checkpoint {path}")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise damaged(path) from error
    if not intact(path):
        raise damaged(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        allowing = "metaformer.mm.checkpoint"  # allows, by name, what mmengine pickles besides tensors
        if "mmengine" in str(error) and allowing not in sys.modules and find_spec("mmengine"):
            import_module(allowing)
            return read_checkpoint(path)
        if "GLOBAL" in str(error):  # the file names a class or function that torch does not count as plain data
            raise InputError(
                f"{path} holds more than tensors and plain data, and reading it could run code: "
                "ask its author for a file of weights only"
            ) from error
        raise damaged(path) from error
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise damaged(path) from error
    if not isinstance(checkpoint, dict):
        raise InputError(f"{path} holds a {type(checkpoint).__name__}, not the weights of a model")
    return checkpoint


def intact(path: Path) -> bool:
    """Whether the records in a file of ``torch.save`` have the checksums beside them, which ``torch.load`` ignores.

    The formats that PyTorch wrote before 1.6, and safetensors, have none.
    """
    if not zipfile.is_zipfile(path):
        return True
    try:
        with zipfile.ZipFile(path) as file:
            stored = all(record.compress_type == zipfile.ZIP_STORED for record in file.infolist())
            return stored and file.testzip() is None
    except (zipfile.BadZipFile, EOFError, OSError, RuntimeError, ValueError):
        return False


def fetch(url: str, folder: str | Path | None = None) -> Path:
    """The file at ``url``, downloaded into PyTorch's cache (or ``folder``) unless it is there.

    Raises:
        InputError: it cannot be fetched, or is damaged or no checkpoint; then it is removed, to be fetched again.
    """
    path = Path(folder or Path(torch.hub.get_dir()) / "checkpoints") / Path(urlparse(url).path).name
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), progress=os.isatty(2))
        except OSError as error:
            raise InputError(
                f"cannot fetch {url} ({error}): fetch it elsewhere and name the file as checkpoint"
            ) from error
    try:
        read_checkpoint(path)
    except InputError:
        path.unlink(missing_ok=True)
        raise
    return path


def damaged(path: Path) -> InputError:
    return InputError(f"{path} is not a checkpoint or is damaged: get or save it again")


def weights_of(checkpoint: dict, ema: bool = False) -> StateDict:
    """The weights in a checkpoint, bare or under ``state_dict`` or ``model``, under the names that they have there.

    With ``ema`` the moving average of the weights, if the checkpoint has one.
    """
    keys = ["state_dict_ema", "state_dict", "model"] if ema else ["state_dict", "model"]
    weights = next((checkpoint[key] for key in keys if isinstance(checkpoint.get(key), dict)), checkpoint)
    parallel = weights and all(str(name).startswith("module.") for name in weights)
    return {name.removeprefix("module."): tensor for name, tensor in weights.items()} if parallel else weights


def named_for(state_dict: StateDict, model: nn.Module) -> StateDict:
    """The state dict under the names of ``model``: for a MetaFormer from any known format, for others as it is."""
    kind = recognised(state_dict) if isinstance(model, MetaFormer) else None
    return state_dict if kind is None else FROM[kind](state_dict)


def load_weights(model: nn.Module, source: str | Path, *, ema: bool = False, replace_head: bool = False) -> str | None:
    """Load a checkpoint into ``model``, all of it or nothing.

    Args:
        source: a file, or the folder of a Hugging Face model; for a :class:`MetaFormer` in any format of
            :mod:`metaformer.formats`, for other models in their own.
        ema: prefer the moving average of the weights, if the checkpoint has one.
        replace_head: keep the model's own classifier where the checkpoint's has another number of classes, or none:
            a detector's or segmentor's has neither the classifier nor the norm before it.

    Returns:
        The format that was recognised; ``None`` for other models.

    Raises:
        InputError: anything missing, unexpected or of another shape.
    """
    weights = weights_of(read_checkpoint(source), ema)
    load_state(model, weights, str(source), replace_head)
    return recognised(weights) if isinstance(model, MetaFormer) else None


def load_state(model: nn.Module, state_dict: StateDict, source: str, replace_head: bool = False) -> None:
    """:func:`load_weights` for a state dict at hand; ``source`` is its name in errors."""
    own = model.state_dict()
    if isinstance(model, MetaFormer) and recognised(state_dict) == "toolbox":
        if not replace_head:
            raise InputError(
                f"{source} holds a backbone without a classifier: use replace_head=true to start with a new one"
            )
        rest = {name: tensor for name, tensor in own.items() if name.startswith(("norm.", "head."))}
        state_dict = {**named_for(state_dict, model), **rest}
    state_dict = named_for(state_dict, model)
    classifier = next((f"{name}." for name, module in model.named_modules() if module is model.get_classifier()), "")
    for name, value in state_dict.items():
        if not isinstance(value, torch.Tensor):
            raise InputError(f"{source} is no checkpoint of a model: {name!r} is a {type(value).__name__}, no tensor")
    problems = differences(own, state_dict)
    other_head = {name for name in problems["of another shape"] if name.startswith(classifier)}
    problems["of another shape"] -= other_head
    if other_head and not (any(problems.values()) or replace_head):
        raise InputError(
            f"{source} has a classifier of {len(state_dict[min(other_head)])} classes and the model one of "
            f"{model.num_classes}: use replace_head=true to start with a new classifier"
        )
    if replace_head:
        state_dict = {**state_dict, **{name: own[name] for name in other_head}}
    else:
        problems["of another shape"] |= other_head
    if any(problems.values()):
        raise InputError(
            f"{source} holds another architecture than the model ({type(model).__name__}): {listed(problems)}"
        )
    model.load_state_dict(state_dict)


def differences(own: StateDict, given: StateDict) -> dict[str, set[str]]:
    """Names of the tensors in which ``given`` differs from a model's ``own``, by kind of difference."""
    return {
        "missing": own.keys() - given.keys(),
        "unexpected": given.keys() - own.keys(),
        "of another kind of number": {
            name
            for name in own.keys() & given.keys()
            if own[name].is_floating_point() != given[name].is_floating_point()
        },
        "of another shape": {name for name in own.keys() & given.keys() if own[name].shape != given[name].shape},
    }


def listed(differences: dict[str, set[str]]) -> str:
    """A phrase for an error message: how many of each kind, and the first three names."""
    return ", ".join(
        f"{len(names)} {kind} ({', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''})"
        for kind, names in differences.items()
        if names
    )
