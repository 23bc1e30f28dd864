"""Load a state dict into a model, either completely or not at all."""

import re
from pathlib import Path

import torch
from torch import nn

from metaformer.errors import InputError
from metaformer.formats import StateDict, recognised, to_ours
from metaformer.model import MetaFormer
from metaformer.weights.files import read_checkpoint

WRAPPED = re.compile(r"^(module\.|_orig_mod\.|timm_model\.)+")
"""What DistributedDataParallel, torch.compile and transformers' TimmWrapper put before a tensor's name."""


def weights_of(checkpoint: dict, ema: bool = True) -> StateDict:
    """The weights in a checkpoint, bare or under ``state_dict`` or ``model``; their moving average if ``ema`` is set
    and the checkpoint has it."""
    keys = ["state_dict_ema", "model_ema", "state_dict", "model"] if ema else ["state_dict", "model"]
    weights = next((checkpoint[key] for key in keys if isinstance(checkpoint.get(key), dict)), checkpoint)
    wrapped = all(WRAPPED.match(str(name)) for name in weights)
    return {WRAPPED.sub("", name): tensor for name, tensor in weights.items()} if wrapped else weights


def load_weights(model: nn.Module, source: str | Path, *, ema: bool = True, replace_head: bool = False) -> str | None:
    """Load a checkpoint into ``model``, either completely or not at all.

    Args:
        source: a file or folder as for :func:`read_checkpoint`, in any format of :mod:`metaformer.formats` for a
            :class:`MetaFormer` and in their own format for other models.
        ema: load the moving average of the weights if the checkpoint has one.
        replace_head: keep the classifier of the model if that of the checkpoint is missing or has another number of
            classes. A detector's or segmentor's checkpoint has neither the classifier nor the norm before it.

    Returns:
        The format that was recognised; ``None`` for other models.

    Raises:
        InputError: a tensor is missing, unexpected or has another shape.
    """
    weights = weights_of(read_checkpoint(source), ema)
    load_state(model, weights, str(source), replace_head)
    return recognised(weights) if isinstance(model, MetaFormer) else None


def load_state(model: nn.Module, state_dict: StateDict, source: str, replace_head: bool = False) -> None:
    """Do the same as :func:`load_weights` with a state dict; error messages name it ``source``."""
    head = head_of(model, state_dict)
    own, given = model.state_dict(), to_ours(state_dict) if isinstance(model, MetaFormer) else state_dict
    for name, value in given.items():
        if not isinstance(value, torch.Tensor):
            raise InputError(f"{source} is no checkpoint of a model: {name!r} is a {type(value).__name__}, no tensor")
    check_finite(given, source)
    problems = differences(own, given)
    in_head = {name for names in problems.values() for name in names if str(name).startswith(head)}
    if any(names - in_head for names in problems.values()):
        raise InputError(
            f"{source} holds another architecture than the model ({type(model).__name__}): {listed(problems)}"
        )
    if in_head and not replace_head:
        classes = next((len(given[name]) for name in sorted(in_head & given.keys()) if given[name].ndim), None)
        says = "holds a backbone without a classifier"
        if classes is not None:
            says = f"has a classifier of {classes} classes and the model one of {model.num_classes}"
        raise InputError(f"{source} {says}: use replace_head=true to start with a new classifier")
    model.load_state_dict({name: (own if name in in_head else given)[name] for name in own})


def check_finite(weights: StateDict, source: str) -> None:
    """Raise an ``InputError`` that names ``source`` if a weight is not finite, as in a run that diverged."""
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise InputError(f"{source} has weights that are not finite, such as {name}: use an earlier checkpoint")


def adaptable(state_dict: StateDict, model: MetaFormer) -> StateDict:
    """Released weights under the names of ``model``, for timm, which adapts them to its channels and classes.

    Raises:
        InputError: a tensor is missing or unexpected. timm would ignore that for another number of classes.
    """
    given, head = to_ours(state_dict), head_of(model, state_dict)
    if unlike := {name for name in model.state_dict().keys() ^ given.keys() if not str(name).startswith(head)}:
        raise InputError(
            f"{model.pretrained_cfg['architecture']} does not have its released weights with these arguments: "
            + listed({"missing or unexpected": unlike})
        )
    return given


def head_of(model: nn.Module, state_dict: StateDict) -> tuple[str, ...]:
    """Beginnings of the names of the layers that weights of another task do not have."""
    trunk = isinstance(model, MetaFormer) and recognised(state_dict) == "toolbox"
    return (*(f"{name}." for name in classifiers(model)), *(["norm."] if trunk else []))


def classifiers(model: nn.Module) -> list[str]:
    """Names of the classifier's layers: several for a distilled DeiT, none for models without ``get_classifier``."""
    told = model.get_classifier() if hasattr(model, "get_classifier") else None
    layers = [*(told if isinstance(told, tuple | list) else [told]), getattr(model, "aux_head", None)]  # of VOLO
    return [name for name, module in model.named_modules() if any(module is layer for layer in layers)]


def differences(own: StateDict, given: StateDict) -> dict[str, set[str]]:
    """Names of the tensors in which ``given`` differs from a model's ``own``, by kind of difference."""
    both = own.keys() & given.keys()
    return {
        "missing": own.keys() - given.keys(),
        "unexpected": given.keys() - own.keys(),
        "of another kind of number": {
            name for name in both if own[name].is_floating_point() != given[name].is_floating_point()
        },
        "of another shape": {name for name in both if own[name].shape != given[name].shape},
    }


def listed(differences: dict[str, set[str]]) -> str:
    """A phrase for an error message: how many names there are of each kind, and the first three."""
    return ", ".join(
        f"{len(names)} {kind} ({', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''})"
        for kind, names in differences.items()
        if names
    )
