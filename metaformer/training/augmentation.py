"""Random crops, resizing and flips of whole batches on the device, for pictures that are kept in memory.

A crop that is resized and perhaps flipped is linear in the rows and in the columns of a picture. Two matrix products
per picture therefore do all of it. Their weights are the integers of Pillow, so that all sums are exact.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from metaformer.training.config import Config

ATTEMPTS = 10
"""Draws of a crop before the largest central crop of an allowed aspect ratio is taken, as in timm."""
WEIGHT_OF_ONE = 2.0**22
"""The integer that stands for the weight 1 in Pillow's resize."""


class Crops(NamedTuple):
    """Int64 arrays (B,) in pixels."""

    top: np.ndarray
    left: np.ndarray
    height: np.ndarray
    width: np.ndarray


def augment(config: Config, images: Tensor, generator: np.random.Generator) -> Tensor:
    """Maps uint8 images (B, 3, H, W) to uint8 images (B, 3, img_size, img_size).

    The crops, filters and flips have the distribution of timm's ``RandomResizedCropAndInterpolation`` and flips, though
    not their random numbers. The pixels are those of Pillow.
    """
    number, _, height, width = images.shape
    crops = draw_crops(config, generator, number, height, width)
    cubic = {"bilinear": 0.0, "bicubic": 1.0, "random": 0.5}[config.train_interpolation]
    flags = (generator.random(number) < share for share in (cubic, config.hflip, config.vflip))
    return crop_resize_flip(images, crops, config.img_size, *flags)


def draw_crops(config: Config, generator: np.random.Generator, number: int, height: int, width: int) -> Crops:
    """Random crops of ``number`` pictures: a share of the area in ``scale``, and width / height in ``ratio``."""
    area = generator.uniform(*config.scale, (number, ATTEMPTS)) * height * width
    aspect = np.exp(generator.uniform(*np.log(config.ratio), (number, ATTEMPTS)))
    widths, heights = np.sqrt(area * aspect).round(), np.sqrt(area / aspect).round()
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    first = np.arange(number), fits.argmax(axis=1)
    found = fits[first]
    whole = np.clip(width / height, *config.ratio)
    h = np.where(found, heights[first], min(height, round(width / whole))).astype(np.int64)
    w = np.where(found, widths[first], min(width, round(height * whole))).astype(np.int64)
    top = np.where(found, generator.integers(0, height - h + 1), (height - h) // 2)
    left = np.where(found, generator.integers(0, width - w + 1), (width - w) // 2)
    return Crops(top, left, h, w)


def crop_resize_flip(
    images: Tensor, crops: Crops, size: int, cubic: np.ndarray, hflip: np.ndarray, vflip: np.ndarray
) -> Tensor:
    """Crop uint8 images (B, 3, H, W), resize them to (B, 3, size, size) and flip them.

    Args:
        cubic: bool array (B,); the filter is bicubic where it is true, and bilinear elsewhere.
        hflip, vflip: bool arrays (B,); which images are mirrored from left to right, and from top to bottom.
    """
    number, channels, height, width = images.shape
    top, left, h, w, cubic, hflip, vflip = (
        torch.as_tensor(values, device=images.device) for values in (*crops, cubic, hflip, vflip)
    )
    across = filter_weights(left, w, width, size, cubic, hflip)  # (B, size, W)
    down = filter_weights(top, h, height, size, cubic, vflip)  # (B, size, H)
    rows = images.double().flatten(1, 2) @ across.mT  # (B, 3 * H, size)
    rows = to_levels(rows).view(number, channels, height, size)  # as Pillow rounds between its two passes
    return to_levels(down[:, None] @ rows).to(torch.uint8)


def to_levels(sums: Tensor) -> Tensor:
    return sums.div_(WEIGHT_OF_ONE).add_(0.5).floor_().clamp_(0, 255)


def filter_weights(start: Tensor, length: Tensor, full: int, size: int, cubic: Tensor, flip: Tensor) -> Tensor:
    """The weights (B, size, full) with which ``full`` pixels make each of ``size`` ones.

    The ``length`` pixels from ``start`` on are resized. When shrinking, the filter is wider by the same factor.
    The weights are integers in float64, of which each row sums to about ``WEIGHT_OF_ONE``.
    """
    output = torch.arange(size, device=start.device)
    output = torch.where(flip[:, None], size - 1 - output, output)  # (B, size)
    scale = (length.double() / size)[:, None]
    center = (output + 0.5) * scale
    pixel = torch.arange(full, device=start.device) - start[:, None]  # (B, full), counted from the crop's edge
    distance = (pixel[:, None] + 0.5 - center[:, :, None]).abs() / scale.clamp(min=1)[:, :, None]
    weights = torch.where(cubic[:, None, None], bicubic(distance), (1 - distance).clamp(min=0))
    weights *= ((pixel >= 0) & (pixel < length[:, None]))[:, None]
    return (weights / weights.sum(2, keepdim=True)).mul_(WEIGHT_OF_ONE).round_()


def bicubic(distance: Tensor) -> Tensor:
    """Keys' cubic convolution with a = -0.5, as in Pillow."""
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return torch.where(distance < 1, near, torch.where(distance < 2, far, 0))
