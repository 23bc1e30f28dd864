"""The compiled operators of mmcv that RetinaNet and Mask R-CNN need (NMS, RoIAlign, focal loss), on torchvision.

mmcv-lite is mmcv without its compiled module ``mmcv._ext``, which ``mmcv.ops`` and therefore mmdet import. The compiled
mmcv has to be built for each version of PyTorch. This file takes the place of the compiled module: its functions have
the names, parameters and results of mmcv 2.1.0 on CPU and GPU. All other operators can be imported and raise
NotImplementedError when they are called. If a compiled mmcv is installed, Python prefers its extension module over this
file.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor


def __getattr__(name: str) -> Callable:
    # mmcv.ops asserts on import that every operator exists, so the error has to wait until the call.
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return partial(_missing, name)


def _missing(operator: str, *_, **__) -> NoReturn:
    raise NotImplementedError(
        f"mmcv-torchvision-ops has no operator {operator}: install the compiled mmcv instead of mmcv-lite for it"
    )


def get_compiler_version() -> str:
    return f"none, operators from torchvision {torchvision.__version__}"


get_compiling_cuda_version = get_compiler_version


def _precise(*tensors: Tensor) -> torch.dtype:
    """float64 if a tensor has it, else float32, since half precision has too few digits for coordinates."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    dtype = _precise(boxes, scores)
    if offset:
        # The width is x2 - x1 + 1. float64, because adding 1 to a large float32 coordinate changes nothing.
        dtype = torch.float64
        boxes = boxes.to(dtype, copy=True)
        boxes[:, 2:] += offset
    # torchvision compares in float64 on the CPU, where a float32 IoU of 0.1 exceeds 0.1: round the threshold alike.
    iou_threshold = torch.tensor(iou_threshold, dtype=dtype).item()
    return torchvision.ops.nms(boxes.to(dtype), scores.to(dtype), iou_threshold)


def roi_align_forward(
    input: Tensor, rois: Tensor, output: Tensor, argmax_y: Tensor, argmax_x: Tensor, *, pool_mode: int, **settings: Any
) -> None:
    if pool_mode == 0:
        _missing("roi_align_forward with pool_mode='max'")
    output.copy_(_roi_align(input.to(_precise(input)), rois, **settings))


def roi_align_backward(
    grad_output: Tensor, rois: Tensor, argmax_y: Tensor, argmax_x: Tensor, grad_input: Tensor, **settings: Any
) -> None:
    del settings["pool_mode"]
    dtype = _precise(grad_output)
    # The average is linear in the input, so the gradient is the same for any input. Autograd is used instead of
    # torchvision's private backward operator, because only the public function honours PyTorch's deterministic mode.
    with torch.enable_grad():
        zeros = torch.zeros_like(grad_input, dtype=dtype, requires_grad=True)
        output = _roi_align(zeros, rois, **settings)
    grad_input.copy_(torch.autograd.grad(output, zeros, grad_output.to(dtype))[0])


def _roi_align(
    input: Tensor,
    rois: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """Maps (B, C, H, W) and rois (K, 5) to the averages (K, C, aligned_height, aligned_width).

    torchvision fails on a roi that ends before it starts, so such a roi gets its start as its end. A roi without a
    sample is empty and has the value 0. It is replaced by a roi of one pixel and masked, since torchvision's
    deterministic RoIAlign gives an empty one the gradient NaN.
    """
    image, start, end = rois.to(input.dtype).split([1, 2, 2], dim=1)
    start = start * spatial_scale
    end = torch.maximum(end * spatial_scale, start)
    empty = (start == end).any(1, keepdim=True) & (aligned and sampling_ratio <= 0)
    rois = torch.cat([image, start.masked_fill(empty, 0), end.masked_fill(empty, 1)], dim=1)
    average = torchvision.ops.roi_align(input, rois, (aligned_height, aligned_width), 1.0, sampling_ratio, aligned)
    return average.masked_fill(empty[:, :, None, None], 0)


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    output.copy_(_focal_loss(input.to(_precise(input)), target, weight, gamma, alpha))


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    with torch.enable_grad():
        logits = input.to(_precise(input)).detach().requires_grad_()
        loss = _focal_loss(logits, target, weight, gamma, alpha).sum()
    grad_input.copy_(torch.autograd.grad(loss, logits)[0])


def _focal_loss(logits: Tensor, target: Tensor, weight: Tensor, gamma: float, alpha: float) -> Tensor:
    """-a (1 - p)^gamma log(p) for each logit (N, classes), where p is the probability of the true answer.

    ``target`` (N,) has the number ``classes`` for the background, which has no logit.
    """
    present = target[:, None] == torch.arange(logits.size(1), device=logits.device)
    wrong = torch.where(present, -logits, logits)  # the logit of 1 - p, which is accurate where p is nearly 1
    loss = (gamma * F.logsigmoid(wrong)).exp() * F.softplus(wrong)
    loss = torch.where(present, alpha * loss, (1 - alpha) * loss)
    return loss * F.pad(weight.to(loss), (0, 1), value=1.0)[target, None] if weight.numel() else loss
