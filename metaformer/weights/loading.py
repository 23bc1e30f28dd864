"""Load a state dict into a model, either completely or not at all."""

import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from metaformer.errors import InputError
from metaformer.formats import StateDict, recognised, to_ours
from metaformer.model import MetaFormer
from metaformer.weights.files import read_checkpoint

Differences = dict[str, set[str]]
"""Names of the tensors in which weights differ from a model, by kind of difference."""
WRAPPED = re.compile(r"^(module\.|_orig_mod\.|timm_model\.)+")
"""What DistributedDataParallel and AveragedModel, torch.compile, and transformers' TimmWrapper put before a name."""


def weights_of(checkpoint: dict, ema: bool = True) -> StateDict:
    """The weights in a checkpoint, bare or under ``state_dict`` or ``model``; their moving average if ``ema`` is set
    and the checkpoint has it."""
    keys = ["state_dict_ema", "model_ema", "state_dict", "model"] if ema else ["state_dict", "model"]
    weights = next((checkpoint[key] for key in keys if isinstance(checkpoint.get(key), dict)), checkpoint)
    weights = {name: tensor for name, tensor in weights.items() if name != "n_averaged"}  # of PyTorch's AveragedModel
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
    given = to_ours(state_dict) if isinstance(model, MetaFormer) else state_dict
    in_head = set().union(*check_fit(model, given, source, lambda name: name.startswith(head)).values())
    if in_head and not replace_head:
        classes = next((len(given[name]) for name in sorted(in_head & given.keys()) if given[name].ndim), None)
        says = "holds a backbone without a classifier"
        if classes is not None:
            says = f"has a classifier of {classes} classes and the model one of {model.num_classes}"
        raise InputError(f"{source} {says}: use replace_head=true to start with a new classifier")
    own = model.state_dict()
    model.load_state_dict({name: (own if name in in_head else given)[name] for name in own})


def check_fit(model: nn.Module, weights: StateDict, source: str, optional: Callable[[str], bool]) -> Differences:
    """Compare weights with the tensors of the same names in a model, before any of them is loaded.

    Args:
        source: what error messages name.
        optional: whether the tensor of a name may be missing, unexpected or of another shape.

    Returns:
        The differences, all of them in optional tensors.

    Raises:
        InputError: a value is no tensor, or not finite as in a run that diverged, or another tensor differs.
    """
    for name, value in weights.items():
        if not isinstance(value, torch.Tensor):
            raise InputError(f"{source} is no checkpoint of a model: {name!r} is a {type(value).__name__}, no tensor")
        if value.is_floating_point() and not value.isfinite().all():
            raise InputError(f"{source} has weights that are not finite, such as {name}: use an earlier checkpoint")
    own = model.state_dict()
    both = own.keys() & weights.keys()
    found = {
        "missing": own.keys() - weights.keys(),
        "unexpected": weights.keys() - own.keys(),
        "of another kind of number": {n for n in both if own[n].is_floating_point() != weights[n].is_floating_point()},
        "of another shape": {name for name in both if own[name].shape != weights[name].shape},
    }
    problems = {kind: {name for name in names if not optional(str(name))} for kind, names in found.items()}
    if any(problems.values()):
        raise InputError(
            f"{source} holds another architecture than the model ({type(model).__name__}): {listed(problems)}"
        )
    return found


def adaptable(state_dict: StateDict, model: MetaFormer) -> StateDict:
    """Released weights under the names of ``model``, for timm, which adapts them to its channels and classes.

    Raises:
        InputError: the weights are those of other arguments. timm would load a part for another number of classes.
    """
    given, adapted = to_ours(state_dict), ("stem.", *head_of(model, state_dict))
    released = f"the released file of {model.pretrained_cfg['architecture']}"
    check_fit(model, given, released, lambda name: name.startswith(adapted))
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


def listed(differences: Differences) -> str:
    """A phrase for an error message: how many names there are of each kind, and the first three."""
    return ", ".join(
        f"{len(names)} {kind} ({', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''})"
        for kind, names in differences.items()
        if names
    )
