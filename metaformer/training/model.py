"""Build the model, the input normalisation and the precision of a run from its settings."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from timm.data import ImageNetInfo, resolve_data_config
from torch import Tensor, nn

import metaformer
from metaformer.errors import InputError
from metaformer.formats import recognised
from metaformer.provenance import sha256
from metaformer.training.config import Config, check
from metaformer.training.data import class_differences
from metaformer.variants import released_file
from metaformer.weights import Opened, load_state, read_checkpoint, weights_of
from metaformer.weights.described import architecture, check_trained_as, described
from metaformer.weights.files import locate
from metaformer.weights.loading import classifiers
from metaformer.weights.opener import arguments_of, create


def build_model(config: Config, num_classes: int, class_names: list[str] | None = None) -> nn.Module:
    """Build the model of ``config`` with released weights, the weights of ``config.checkpoint``, or random ones.

    Args:
        class_names: class names of the data in the order of their labels. The classifier of ``config.checkpoint`` is
            sorted into this order. With ``replace_head``, a new classifier replaces it if the names differ.

    Raises:
        InputError: the model does not exist, does not take the arguments or the images, or the checkpoint does not fit.
    """
    model = create(config.model, num_classes, arguments_of(config.model, dict(config)), config.pretrained)
    check_input(model, config)
    if not config.checkpoint:
        return model
    checkpoint = read_checkpoint(config.checkpoint)
    weights = weights_of(checkpoint)
    check_trained_as(config.model, config.model_args, checkpoint, config.checkpoint)
    load_state(model, weights, config.checkpoint, config.replace_head)
    trained = described(locate(config.checkpoint), checkpoint, recognised(weights)).get("class_names")
    if config.replace_head and trained and class_names and {*folder_names(trained)} != {*folder_names(class_names)}:
        model.reset_classifier(num_classes)
    else:
        match_classes(model, trained, class_names, config.checkpoint)
    return model


def check_input(model: nn.Module, config: Config) -> None:
    """Raise an ``InputError`` if the model does not map an RGB image of ``img_size`` to one vector of logits."""
    side, training, like = config.img_size, model.training, next(model.parameters())
    try:
        with torch.no_grad():
            logits = model.eval()(like.new_zeros(1, 3, side, side))
    except (AssertionError, RuntimeError) as error:  # timm's and PyTorch's
        raise InputError(
            f"{config.model} does not take RGB images of {side} x {side} pixels ({' '.join(str(error).split())}): use "
            f"another img_size=, or where the model has such an argument, model_args={{img_size: {side}}}"
        ) from error
    if not isinstance(logits, Tensor) or logits.shape != (1, model.num_classes):
        raise InputError(f"{config.model} with model_args {config.model_args} does not give a vector of logits")
    model.train(training)


def match_classes(model: nn.Module, trained: list[str] | None, data: list[str] | None, source: str) -> None:
    """Sort the classifier of a model by the classes of the data; see :func:`class_order`."""
    if not (order := class_order(trained, data, source)):
        return
    layers = [model.get_submodule(name) for name in classifiers(model)]
    if not layers or not all(isinstance(layer, nn.Linear | nn.Conv2d) for layer in layers):
        raise InputError(f"{source} has the classes in another order, and the classifier of its model cannot be sorted")
    for parameter in (parameter for layer in layers for parameter in layer.parameters()):
        parameter.data = parameter.data[order]


def class_order(trained: list[str] | None, data: list[str] | None, source: str) -> list[int] | None:
    """For each class of the data, its index among the classes of the checkpoint ``source``.

    ``None`` if the orders are equal, or if one of the two has no class names.

    Raises:
        InputError: the names differ.
    """
    if not trained or not data or folder_names(trained) == folder_names(data):
        return None
    if set(trained) != set(data) or len(set(data)) < len(data):
        differences = class_differences({"the checkpoint": trained, "the data": data})
        raise InputError(f"the data have other classes than {source} was trained on ({differences})")
    return [trained.index(name) for name in data]


def folder_names(names: list[str]) -> list[str]:
    """ImageNet's synsets, which its folders have as names, for its descriptions; other names as they are."""
    imagenet = ImageNetInfo()
    described = sum(map(str.__eq__, names, imagenet.label_descriptions()))
    return imagenet.label_names() if described > 900 and len(names) == 1000 else names  # such lists differ slightly


def settings_of(opened: Opened, overrides: dict[str, Any]) -> Config:
    """The settings to use an opened checkpoint with: those of its run and its input, replaced by ``overrides``.

    Raises:
        InputError: a setting does not exist, the model's images are not square, or it does not take those of img_size.
    """
    source, (height, width) = str(opened.path or opened.name), opened.size
    if height != width:
        raise InputError(
            f"{source} takes images of {height} x {width} pixels, and pictures are cropped to squares only"
        )
    run = {name: value for name, value in (opened.config or {}).items() if value is not None}
    own = {"model_args": opened.model_args, "img_size": height, "num_classes": opened.model.num_classes}
    start = {"model": opened.name, "pretrained": False, "checkpoint": None, "replace_head": False}
    config = check({**own, **opened.inputs, **run, **overrides, **start}, source=source)
    check_input(opened.model, config)
    return with_input_of(config, opened.model)


def released_weights(config: Config) -> dict[str, str] | None:
    """Name and SHA-256 of the released file from which training starts; ``None`` without one."""
    if not config.pretrained or architecture(config.model) not in metaformer.VARIANTS:
        return None
    file = released_file(config.model, **config.model_args)
    return {"file": file.name, "sha256": sha256(file)} if file else None


def with_input_of(config: Config, model: nn.Module) -> Config:
    """The config, completed by the model's own normalisation, crop and interpolation."""
    own = resolve_data_config(model=model)
    names = ("crop_pct", "interpolation", "mean", "std")
    return config.model_copy(update={name: own[name] for name in names if getattr(config, name) is None})


def normaliser(config: Config, device: torch.device) -> Callable[[Tensor], Tensor]:
    """A function from images (B, 3, H, W), of 0 to 255, to normalised float32 ones on the device."""
    mean, std = (
        torch.tensor([255 * value for value in values], device=device).view(1, 3, 1, 1)
        for values in (config.mean, config.std)
    )
    layout = torch.channels_last if config.channels_last else torch.contiguous_format

    def normalise(images: Tensor) -> Tensor:
        images = images.to(device, non_blocking=True).to(torch.float32, memory_format=layout)
        return images.sub(mean).div_(std)

    return normalise


def precision_on(config: Config, device: torch.device) -> str:
    """The precision of the config; "auto" is bfloat16 on CUDA and float32 on a CPU."""
    if config.precision == "auto":
        return "bfloat16" if device.type == "cuda" else "float32"
    return config.precision


def autocast(config: Config, device: torch.device) -> AbstractContextManager:
    """PyTorch's autocast in the precision of the config; off for float32."""
    precision = precision_on(config, device)
    if precision == "float16" and device.type == "cpu":
        raise InputError("precision=float16 needs a GPU: use float32 or bfloat16 on a CPU")
    return torch.autocast(device.type, getattr(torch, precision), enabled=precision != "float32")


@contextmanager
def enough_memory(images: int) -> Iterator[None]:
    """Raise an ``InputError`` if the block, which computes on ``images`` at once, runs out of a GPU's memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"the GPU has too little memory for {images} images at once: use a smaller device_batch=, or --batch of "
            "predict.py"
        ) from error
