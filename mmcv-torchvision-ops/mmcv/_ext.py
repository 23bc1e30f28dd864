"""mmcv's compiled operators for common detectors (NMS, soft-NMS, RoIAlign, sigmoid focal loss), on torchvision.

mmcv-lite is mmcv without its compiled module ``mmcv._ext``, and so without ``mmcv.ops``, which mmdet imports; mmcv with
it has to be built for each version of PyTorch. This file takes the module's place beside mmcv-lite: the functions have
the names, the parameters and the results with which mmcv 2.1.0 calls the compiled ones, on CPU and GPU, and every other
operator raises NotImplementedError once it is called. Where a compiled mmcv is installed, Python's import system
prefers its extension module over this file in the same folder.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor


def __getattr__(name: str) -> Callable:
    # mmcv.ops asserts on import that every operator is there, so only the call may fail.
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def missing(*args, **kwargs):
        raise NotImplementedError(
            f"mmcv-torchvision-ops has no operator {name}: install the compiled mmcv instead of mmcv-lite for it"
        )

    return missing


def get_compiler_version() -> str:
    return f"none, operators from torchvision {torchvision.__version__}"


def get_compiling_cuda_version() -> str:
    return get_compiler_version()


def _precise(*tensors: Tensor) -> torch.dtype:
    """float64 where there is any, else float32: half precision has too few digits for coordinates."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    dtype = _precise(boxes, scores)
    if offset:
        # Widths of x2 - x1 + 1, in float64 because large float32 coordinates would swallow the 1.
        dtype = torch.float64
        boxes = boxes.to(dtype, copy=True)
        boxes[:, 2:] += offset
    # On the CPU torchvision compares the IoU with the threshold in float64, where a float32 IoU of 0.1 exceeds 0.1.
    iou_threshold = torch.tensor(iou_threshold, dtype=dtype).item()
    return torchvision.ops.nms(boxes.to(dtype), scores.to(dtype), iou_threshold)


def _iou(box: Tensor, others: Tensor, offset: int) -> Tensor:
    x1, y1, x2, y2 = others.unbind(1)
    width = (torch.minimum(box[2], x2) - torch.maximum(box[0], x1) + offset).clamp(min=0)
    height = (torch.minimum(box[3], y2) - torch.maximum(box[1], y1) + offset).clamp(min=0)
    overlap = width * height
    union = (box[2] - box[0] + offset) * (box[3] - box[1] + offset) + (x2 - x1 + offset) * (y2 - y1 + offset) - overlap
    return torch.where(union == 0, 0, overlap / union)


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    dtype = _precise(boxes, scores)
    boxes, scores = boxes.to(dtype), scores.to(dtype)
    left = torch.arange(len(boxes), device=boxes.device)
    kept = []
    while len(left):
        best = scores.argmax()
        dets[len(kept), :4], dets[len(kept), 4] = boxes[best], scores[best]
        kept.append(left[best].item())
        iou = _iou(boxes[best], boxes, offset)
        if method == 2:
            scores = scores * torch.exp(-iou.square() / sigma)
        else:
            scores = torch.where(iou >= iou_threshold, scores * (1 - iou if method == 1 else 0), scores)
        stays = scores >= min_score
        stays[best] = False
        left, boxes, scores = left[stays], boxes[stays], scores[stays]
    return torch.tensor(kept, dtype=torch.int64)


def nms_match(dets: Tensor, iou_threshold: float) -> list[list[int]]:
    dets = dets.to(_precise(dets))
    order = dets[:, 4].sort(descending=True, stable=True).indices
    groups = []
    while len(order):
        first, rest = order[0], order[1:]
        suppressed = _iou(dets[first, :4], dets[rest, :4], offset=0) >= iou_threshold
        groups.append([first.item(), *rest[suppressed].tolist()])
        order = rest[~suppressed]
    return groups


def _on_map(
    rois: Tensor, dtype: torch.dtype, spatial_scale: float, sampling_ratio: int, aligned: bool
) -> tuple[Tensor, Tensor]:
    """The rois in pixels of the feature map, and which of them are empty: without a sample, so of value 0.

    A roi that ends before it starts ends at its start: torchvision fails on a negative number of samples. An empty one
    becomes another, and its values are to be masked: torchvision's deterministic RoIAlign gives it the gradient NaN.
    """
    image, start, end = rois.to(dtype).split([1, 2, 2], dim=1)
    start = start * spatial_scale
    end = torch.maximum(end * spatial_scale, start)
    empty = (start == end).any(1, keepdim=True) & (aligned and sampling_ratio <= 0)
    return torch.cat([image, start.masked_fill(empty, 0), end.masked_fill(empty, 1)], dim=1), empty[:, :, None, None]


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    input = input.to(_precise(input))
    rois, empty = _on_map(rois, input.dtype, spatial_scale, sampling_ratio, aligned)
    size = aligned_height, aligned_width
    if pool_mode == 1:
        average = torchvision.ops.roi_align(input, rois, size, 1.0, sampling_ratio, aligned)
        output.copy_(average.masked_fill_(empty, 0))
        return

    start, extent = rois[:, 1:3] - 0.5 * aligned, rois[:, 3:] - rois[:, 1:3]
    if not aligned:
        extent = extent.clamp(min=1)
    bins = extent / extent.new_tensor([aligned_width, aligned_height])
    grids = torch.full_like(bins, sampling_ratio) if sampling_ratio > 0 else bins.ceil()
    for k, (image, (grid_x, grid_y)) in enumerate(zip(rois[:, 0].long().tolist(), grids.long().tolist(), strict=True)):
        x = start[k, 0] + bins[k, 0] * _centres(aligned_width, grid_x, bins)
        y = start[k, 1] + bins[k, 1] * _centres(aligned_height, grid_y, bins)
        rows = sum(input[image][:, low] * part[:, None] for low, part in _neighbours(y, input.size(2)))
        samples = sum(rows[:, :, low] * part for low, part in _neighbours(x, input.size(3)))
        # (C, bins, samples of a bin) for the values, then the same without C for the coordinates
        values, y, x = (
            grid.unflatten(-1, (aligned_width, grid_x)).unflatten(-3, (aligned_height, grid_y)).transpose(-3, -2)
            for grid in (samples, *torch.meshgrid(y, x, indexing="ij"))
        )
        output[k], best = values.flatten(-2).max(-1)
        argmax_y[k] = y.flatten(-2).expand(*best.shape, -1).gather(-1, best[..., None])[..., 0]
        argmax_x[k] = x.flatten(-2).expand(*best.shape, -1).gather(-1, best[..., None])[..., 0]
    output.masked_fill_(empty, 0)
    argmax_y.masked_fill_(empty, -1)
    argmax_x.masked_fill_(empty, -1)


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    dtype = _precise(grad_output)
    rois, empty = _on_map(rois, dtype, spatial_scale, sampling_ratio, aligned)
    grad_output = grad_output.to(dtype).masked_fill(empty, 0)
    if pool_mode == 1:
        # The average is linear in the input, so any input has its gradient. Through autograd and not torchvision's
        # private backward operator, because the public function alone honours PyTorch's deterministic mode.
        with torch.enable_grad():
            anything = torch.zeros_like(grad_input, dtype=dtype, requires_grad=True)
            size = aligned_height, aligned_width
            output = torchvision.ops.roi_align(anything, rois, size, 1.0, sampling_ratio, aligned)
        grad_input.copy_(torch.autograd.grad(output, anything, grad_output)[0])
        return

    images, channels = rois[:, 0].long()[:, None, None, None], torch.arange(grad_input.size(1), device=rois.device)
    total = torch.zeros_like(grad_input, dtype=dtype)
    for y, part_y in _neighbours(argmax_y.to(dtype), grad_input.size(2)):
        for x, part_x in _neighbours(argmax_x.to(dtype), grad_input.size(3)):
            total.index_put_((images, channels[:, None, None], y, x), grad_output * part_y * part_x, accumulate=True)
    grad_input.copy_(total)


def _centres(bins: int, samples: int, like: Tensor) -> Tensor:
    """Where the samples of all bins are, in bins."""
    return (torch.arange(bins * samples, dtype=like.dtype, device=like.device) + 0.5) / samples


def _neighbours(points: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    """The pixel before and the pixel after each coordinate, and their parts in linear interpolation, 0 off the map."""
    inside = (points >= -1) & (points <= size)
    points = points.clamp(0, size - 1)
    before = points.long()
    part = points - before
    return [(before, (1 - part) * inside), ((before + 1).clamp(max=size - 1), part * inside)]


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    def absent(logits: Tensor, out: Tensor) -> Tensor:
        """The loss -p^gamma log(1 - p) of each class that is not the target's."""
        return out.copy_(logits).sigmoid_().pow_(gamma).mul_(F.softplus(logits))

    _fill(output, absent, input, target, weight, absent_factor=1 - alpha, present_factor=alpha)


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    def absent(logits: Tensor, out: Tensor) -> Tensor:
        """Its derivative p^gamma (p - (1 - p) gamma log(1 - p)) by the logit."""
        p = out.copy_(logits).sigmoid_()
        slope = F.softplus(logits).mul_(gamma).lerp_(logits.new_ones(()), p)
        return p.pow_(gamma).mul_(slope)

    _fill(grad_input, absent, input, target, weight, absent_factor=1 - alpha, present_factor=-alpha)


def _fill(
    out: Tensor,
    absent: Callable[[Tensor, Tensor], Tensor],
    input: Tensor,
    target: Tensor,
    weight: Tensor,
    absent_factor: float,
    present_factor: float,
) -> None:
    """Fill ``out`` by the formula for absent classes, and for each row's target by that of the logit's opposite.

    In place, because the logits of a large image are tens of millions.
    """
    absent(input, out).mul_(absent_factor)
    classes = input.size(1)
    column = target.clamp(max=classes - 1)[:, None]  # the background has the number after the last class, and no column
    own = -input.gather(1, column)
    own = absent(own, torch.empty_like(own)).mul_(present_factor)
    out.scatter_(1, column, torch.where(target[:, None] < classes, own, out.gather(1, column)))
    if weight.numel():
        out.mul_(F.pad(weight, (0, 1), value=1.0)[target, None])
