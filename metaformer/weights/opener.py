"""Open a checkpoint as the model that was trained, with its input settings and class names."""

import os
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import timm
from timm.data import resolve_data_config
from timm.layers import to_2tuple
from torch import nn

from metaformer import variants
from metaformer.errors import InputError, check_known, explained, nearest
from metaformer.formats import StateDict, recognised, to_ours
from metaformer.model import MetaFormer
from metaformer.weights.described import Settings, architecture, described
from metaformer.weights.files import locate, read_checkpoint
from metaformer.weights.loading import classifiers, load_state, weights_of


class Opened(NamedTuple):
    """A model from a checkpoint and what belongs to it."""

    model: nn.Module  # in eval mode, with its weights: the moving average if the run kept one
    name: str  # timm's
    size: tuple[int, int]  # height and width of the images in pixels
    crop_pct: float  # share of the resized picture that the evaluation crop keeps
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: list[str] | None  # in the order of the logits; None if the checkpoint does not state them
    model_args: dict[str, Any]  # of timm.create_model, in which the model differs from others of its name
    config: Settings | None  # of the run that wrote the checkpoint; None if it is from elsewhere
    path: Path | None  # of the checkpoint file; None for weights that timm keeps
    format: str | None  # of the weights (metaformer.formats); None for models that are no MetaFormer

    @property
    def inputs(self) -> Settings:
        """How pictures of ``size`` are made, as arguments of ``timm.data.create_transform``."""
        return {name: getattr(self, name) for name in INPUTS}


INPUTS = ("crop_pct", "interpolation", "mean", "std")


def open_checkpoint(source: str | Path, model: str | None = None, **settings: Any) -> Opened:
    """Build the model of a checkpoint with the arguments it was trained with, and load its weights.

    Args:
        source: folder or file of a run, file or folder in any format of :mod:`metaformer.formats`, or name of a model
            whose released weights are fetched.
        model: timm's name of the model, for checkpoints that do not state it.
        settings: ``model_args``, ``img_size``, ``crop_pct``, ``interpolation``, ``mean`` and ``std`` replace those of
            the checkpoint.

    Raises:
        InputError: the checkpoint does not exist, its model is unknown, it is of another model, or a setting that comes
            with it or is given cannot be used.
    """
    for name in settings:
        check_known("setting of open_checkpoint", name, ("model_args", "img_size", *INPUTS))
    found = {name: value for name, value in settings.items() if value is not None}
    # A file can state any value, and timm and PyTorch raise errors of many kinds for values that do not fit.
    with explained(f"a setting of {source} cannot be used, correct it or get new files"):
        return with_settings(source, model, found)


def with_settings(source: str | Path, model: str | None, found: Settings) -> Opened:
    """:func:`open_checkpoint` with settings that replace those of the checkpoint."""
    if not os.path.exists(source) and (str(source) == model or timm.is_model(str(source))):
        name = str(source)
        built = create(name, None, arguments_of(name, found), pretrained=True)
        path = variants.released_file(name) if architecture(name) in variants.VARIANTS else None
        kind = "official" if path else None
    else:
        path = locate(source)
        checkpoint = read_checkpoint(path)
        weights = weights_of(checkpoint)
        kind = recognised(weights)
        found = {**described(path, checkpoint, kind), **found}
        name = model or found.get("model")
        if name is None:
            raise InputError(f"{path} does not say what model it is of: give --model poolformer_s12 or another")
        if architecture(found.get("model") or name) != architecture(name):
            raise InputError(f"{path} is a checkpoint of {found['model']}, not of {name}: leave out --model")
        built = build(name, weights, found, path)
    usual = {}  # arguments that are those of every model of this name
    if architecture(name) in variants.VARIANTS:
        usual = {p.name: p.default for p in signature(MetaFormer).parameters.values()}
        usual |= variants.variant_arguments(architecture(name))
    stated = (found.get("model_args") or {}).items()
    model_args = {key: value for key, value in stated if value is not None and usual.get(key) != value}
    names = found.pop("class_names", None)
    if names and len(names) != built.num_classes:
        raise InputError(f"{path} names {len(names)} classes, but its classifier has {built.num_classes}")
    config = found if "epochs" in found else None
    given = {key: found[key] for key in (*INPUTS, "crop_mode") if found.get(key) is not None}
    own = resolve_data_config({**given, "crop_mode": "center"} if config else given, model=built)
    if own["crop_mode"] != "center":
        raise InputError(
            f"{source} takes pictures with crop_mode={own['crop_mode']!r}, and pictures are cropped to their center "
            "here only: use timm's own commands"
        )
    size = tuple(map(int, to_2tuple(found.get("img_size") or model_args.get("img_size") or own["input_size"][1:])))
    own["input_size"] = (own["input_size"][0], *size)
    built.pretrained_cfg = {**built.pretrained_cfg, **own}  # where timm's functions look for the input settings
    mean, std = (tuple(map(float, own[name])) for name in ("mean", "std"))
    inputs = (float(own["crop_pct"]), own["interpolation"], mean, std)
    kind = kind if isinstance(built, MetaFormer) else None
    return Opened(built.eval(), name, size, *inputs, names, model_args, config, path, kind)


def build(name: str, weights: StateDict, found: Settings, path: Path) -> nn.Module:
    arguments = arguments_of(name, found)
    if architecture(name) in variants.VARIANTS:
        weights = to_ours(weights)
        if "stem.weight" in weights:
            arguments.setdefault("in_chans", weights["stem.weight"].shape[1])
    num_classes = found.get("num_classes") or len(found.get("class_names") or ())
    model = create(name, num_classes or None, arguments)
    if not num_classes:
        heads = tuple(f"{head}." for head in classifiers(model))
        outputs = (key for key, tensor in model.state_dict().items() if tensor.shape[:1] == (model.num_classes,))
        classes = [len(weights[key]) for key in outputs if key.startswith(heads) and key in weights]
        if not classes:
            raise InputError(f"{path} has no classifier: only whole models can be opened")
        model.reset_classifier(classes[0])
    load_state(model, weights, str(path))
    return model


def create(name: str, num_classes: int | None, arguments: dict[str, Any], pretrained: bool = False) -> nn.Module:
    """Call ``timm.create_model``; an unknown model, wrong arguments and a failed download raise ``InputError``."""
    if not isinstance(name, str) or not timm.is_model(name):
        raise InputError(f"there is no model {name!r}{nearest(str(name), timm.list_models())}")
    try:  # timm leaves out arguments that are None, so a model without drop path works too
        return timm.create_model(name, pretrained=pretrained, num_classes=num_classes, **arguments)
    except InputError:
        raise
    except Exception as error:  # a model is code, and fails for arguments that do not fit in any way
        reason = " ".join(str(error).split()) or type(error).__name__
        says = f"{name} does not take these arguments: {reason}"
        if "loading state_dict" in reason:
            says = f"{name} does not have its released weights with these arguments: {reason}"
        elif pretrained and isinstance(error, OSError | RuntimeError):
            says = f"cannot fetch the released weights of {name} ({reason}): give a checkpoint instead"
        raise InputError(says) from error


def arguments_of(name: str, settings: Settings) -> dict[str, Any]:
    """The arguments of ``timm.create_model`` for the settings of a run."""
    arguments = {"drop_path_rate": settings.get("drop_path") or None, "drop_rate": settings.get("drop") or None}
    if architecture(name) in variants.VARIANTS:
        arguments["img_size"] = settings.get("img_size")  # for token mixers that fix the number of tokens
    return {**arguments, **(settings.get("model_args") or {})}
