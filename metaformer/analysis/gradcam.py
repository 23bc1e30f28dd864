"""Grad-CAM maps of pictures (the paper's Figure 4): the regions that raise the score of a model's top class."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
from matplotlib.figure import Figure
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.image import show_cam_on_image
from timm.data import resolve_data_config
from timm.models import get_model_input_config
from torch import Tensor, nn

from metaformer import open_checkpoint
from metaformer.errors import InputError
from metaformer.mixers import Size
from metaformer.prediction import Pictures
from metaformer.training.batches import to_rgb

PAPER = ("resnet50.a2_in1k", "deit_small_patch16_224", "resmlp_24_224", "poolformer_s24")
"""The columns of Figure 4; the ResNet has the RSB A2 weights of 300 epochs."""


def target_layer(name: str, model: nn.Module, size: Size) -> tuple[nn.Module, Callable[[Tensor], Tensor] | None]:
    """The layer that the official script uses, and a function that turns its output for images of ``size`` into a map.

    The layer is the last stage of a MetaFormer or ResNet, the last block of a ResMLP, or the first norm of the last
    block of a DeiT (misc/cam_image.py of sail-sg/poolformer).

    Raises:
        InputError: the model is of another kind, or does not take RGB images.
    """
    if (channels := get_model_input_config(model)["input_size"][0]) != 3:
        raise InputError(f"{name} takes images of {channels} channels: Grad-CAM is drawn over RGB pictures")
    kinds = [kind.__name__ for kind in type(model).__mro__]
    if "MetaFormer" in kinds:  # timm's too
        return model.stages[-1], None
    if "ResNet" in kinds:
        return model.layer4[-1], None
    if "MlpMixer" in kinds:
        return model.blocks[-1], partial(tokens_to_map, prefix=0, grid=model.stem.dynamic_feat_size(size))
    if "VisionTransformer" in kinds:
        grid = model.patch_embed.dynamic_feat_size(size)
        return model.blocks[-1].norm1, partial(tokens_to_map, prefix=model.num_prefix_tokens, grid=grid)
    raise InputError(f"{name} is a {kinds[0]}: Grad-CAM supports MetaFormer, ResNet, MlpMixer and VisionTransformer")


def tokens_to_map(tokens: Tensor, prefix: int, grid: Size) -> Tensor:
    """(B, prefix + H * W, C) to (B, C, H, W) for a ``grid`` of H x W, without the ``prefix`` first tokens."""
    return tokens[:, prefix:].transpose(1, 2).unflatten(2, grid)


def read_picture(path: Path, size: Size = (224, 224)) -> np.ndarray:
    """Read a picture as RGB (H, W, 3) from 0 to 1, resized without a crop as in the official script."""
    try:
        pixels = np.asarray(to_rgb(Pictures([path])[0][0]))
    except Exception as error:  # decoders fail in their own ways
        raise InputError(f"cannot read the picture {path}: {error}") from error
    return cv2.resize(pixels, size[::-1], interpolation=cv2.INTER_AREA).astype(np.float32) / 255


def maps(name: str, source: str | Path, paths: list[Path]) -> list[np.ndarray]:
    """The maps of a checkpoint of the model ``name``, drawn over pictures at the size of its training."""
    opened = open_checkpoint(source, name)
    return cam_of(name, opened.model, [read_picture(path, opened.size) for path in paths])


def cam_of(name: str, model: nn.Module, pictures: list[np.ndarray]) -> list[np.ndarray]:
    """The pictures (H, W, 3), of one size, with the model's map drawn over each."""
    own = resolve_data_config(model=model)
    mean, std = (torch.tensor(own[key]).view(3, 1, 1) for key in ("mean", "std"))
    layer, reshape = target_layer(name, model, pictures[0].shape[:2])
    overlays = []
    with GradCAM(model=model, target_layers=[layer], reshape_transform=reshape) as cam:
        for picture in pictures:
            images = ((torch.from_numpy(picture).permute(2, 0, 1) - mean) / std)[None]
            overlays.append(show_cam_on_image(picture, cam(images, targets=None)[0], use_rgb=True))
    return overlays


def draw(pictures: list[np.ndarray], columns: dict[str, list[np.ndarray]]) -> Figure:
    """A figure with a row for each picture, and a column for the pictures and for each entry of ``columns``."""
    shape = (len(pictures), 1 + len(columns))
    figure = Figure(figsize=(1.9 * shape[1], 1.9 * shape[0]), layout="tight")
    axes = figure.subplots(*shape, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for column, (title, images) in enumerate({"input": pictures, **columns}.items()):
        axes[0, column].set_title(title, fontsize=8)
        for row, image in enumerate(images):
            axes[row, column].imshow(image)
    return figure
