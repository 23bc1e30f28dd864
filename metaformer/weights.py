"""Weights in: read a checkpoint safely, and load it or say exactly why not."""

import pickle
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from metaformer.errors import InputError

StateDict = dict[str, Tensor]

OFFICIAL_NAMES = [
    (r"^patch_embed\.proj\.", "stem."),
    (r"^network\.([0246])\.(\d+)\.", lambda m: f"stages.{int(m[1]) // 2}.blocks.{m[2]}."),
    (r"^network\.([135])\.proj\.", lambda m: f"stages.{(int(m[1]) + 1) // 2}.downsample."),
    (r"\.layer_scale_([12])$", r".layer_scale\1"),
]
"""Names in the official release (``network.*``) and what they are called here."""


def from_official(state_dict: StateDict, model: nn.Module | None = None) -> StateDict:
    """The official release's names to ours; other state dicts as they are. (``model``: timm's filter signature.)"""
    if not any(name.startswith("network.") for name in state_dict):
        return state_dict
    renamed = {}
    for name, tensor in state_dict.items():
        for pattern, replacement in OFFICIAL_NAMES:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


def read_checkpoint(path: str | Path) -> dict:
    """What ``torch.save`` wrote to ``path``, on the CPU; nothing in the file is executed (``weights_only``).

    Raises:
        InputError: no such file, damaged or no checkpoint at all, or one that holds more than tensors and plain data.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no checkpoint {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
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


def damaged(path: Path) -> InputError:
    return InputError(f"{path} is not a checkpoint or is damaged: get or save it again")


def weights_of(checkpoint: dict, ema: bool = False) -> StateDict:
    """The weights in a checkpoint, bare or under ``state_dict`` or ``model``, under this package's names.

    With ``ema`` the moving average of the weights, if the checkpoint has one.
    """
    keys = ["state_dict", "model"]
    for key in ["state_dict_ema", *keys] if ema else keys:
        if isinstance(checkpoint.get(key), dict):
            return from_official(checkpoint[key])
    return from_official(checkpoint)


def load_weights(model: nn.Module, source: str | Path, *, ema: bool = False, replace_head: bool = False) -> None:
    """Load the checkpoint file ``source`` (our own or the official release's) into ``model``, all of it or nothing.

    Args:
        ema: prefer the moving average of the weights, if the checkpoint has one.
        replace_head: keep the model's own classifier where the checkpoint's has another number of classes.

    Raises:
        InputError: anything missing, unexpected or of another shape.
    """
    load_state(model, weights_of(read_checkpoint(source), ema), str(source), replace_head)


def load_state(model: nn.Module, state_dict: StateDict, source: str, replace_head: bool = False) -> None:
    """:func:`load_weights` for a state dict at hand; ``source`` is its name in errors."""
    own = model.state_dict()
    classifier = next((f"{name}." for name, module in model.named_modules() if module is model.get_classifier()), "")
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
        "of another shape": {name for name in own.keys() & given.keys() if own[name].shape != given[name].shape},
    }


def listed(differences: dict[str, set[str]]) -> str:
    """A phrase for an error message: how many of each kind, and the first three names."""
    return ", ".join(
        f"{len(names)} {kind} ({', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''})"
        for kind, names in differences.items()
        if names
    )
