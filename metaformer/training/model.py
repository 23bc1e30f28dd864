"""The model of a run, its input normalisation and its precision, from the settings."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import timm
import torch
from timm.data import resolve_data_config
from torch import Tensor, nn

import metaformer
from metaformer.errors import InputError, nearest
from metaformer.provenance import sha256
from metaformer.training.config import Config
from metaformer.variants import released_file
from metaformer.weights import load_state, read_checkpoint, weights_of


def build_model(config: Config, num_classes: int) -> nn.Module:
    """The model of ``config`` with its released weights, those of ``checkpoint``, or fresh ones."""
    if not timm.is_model(config.model):
        raise InputError(f"there is no model {config.model!r}{nearest(config.model, timm.list_models())}")
    # timm hands on what is not None: a model without drop path need not know the word.
    arguments = {"drop_path_rate": config.drop_path or None, "drop_rate": config.drop or None}
    if config.model in metaformer.VARIANTS:
        arguments["img_size"] = config.img_size  # for token mixers that fix the number of tokens
    try:
        model = timm.create_model(
            config.model, pretrained=config.pretrained, num_classes=num_classes, **{**arguments, **config.model_args}
        )
    except TypeError as error:
        raise InputError(f"{config.model} does not take these arguments: {error}") from error
    except (OSError, RuntimeError) as error:
        if not config.pretrained:
            raise
        raise InputError(f"cannot fetch the released weights of {config.model}: {error}") from error
    if config.checkpoint:
        weights = weights_of(read_checkpoint(config.checkpoint), ema=True)
        load_state(model, weights, config.checkpoint, config.replace_head)
    return model


def released_weights(config: Config) -> dict[str, str] | None:
    """Name and SHA-256 of the released file that training starts from, if it does and the model is one of ours."""
    if not config.pretrained or config.model not in metaformer.VARIANTS:
        return None
    file = released_file(config.model)
    return {"file": file.name, "sha256": sha256(file)}


def with_input_of(config: Config, model: nn.Module) -> Config:
    """The config with what it leaves to the model: normalisation, crop and interpolation of the evaluation."""
    own = resolve_data_config(model=model)
    names = ("crop_pct", "interpolation", "mean", "std")
    return config.model_copy(update={name: own[name] for name in names if getattr(config, name) is None})


def normaliser(config: Config, device: torch.device) -> Callable[[Tensor], Tensor]:
    """uint8 images (B, 3, H, W) to normalised float32 ones on the device."""
    mean, std = (255 * torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (config.mean, config.std))
    layout = torch.channels_last if config.channels_last else torch.contiguous_format

    def normalise(images: Tensor) -> Tensor:
        images = images.to(device, non_blocking=True).to(torch.float32, memory_format=layout)
        return images.sub_(mean).div_(std)

    return normalise


def precision_on(config: Config, device: torch.device) -> str:
    """The precision of the config; "auto" is bfloat16 on CUDA and float32 on a CPU."""
    if config.precision == "auto":
        return "bfloat16" if device.type == "cuda" else "float32"
    return config.precision


def autocast(config: Config, device: torch.device) -> AbstractContextManager:
    precision = precision_on(config, device)
    if precision == "float16" and device.type == "cpu":
        raise InputError("precision=float16 needs a GPU: use float32 or bfloat16 on a CPU")
    return torch.autocast(device.type, getattr(torch, precision), enabled=precision != "float32")
