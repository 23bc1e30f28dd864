"""The two halves of a PoolFormer block in fewer passes over memory: the same function, another order of the algebra.

Shapes: B images, C channels, H x W positions; maps are (B, C, H, W), kept channels-last, so that a map is also a matrix
of B * H * W rows and C columns, and a 1x1 convolution a matrix product.

First half. An average that does not count its border maps a constant to itself. With ``N(x) = gamma * (x - mean) * rstd
+ beta`` (MLN: one mean and one rstd per sample), mean and beta cancel in the mixer:

    pool(N(x)) - N(x) = gamma * rstd * (pool(x) - x)

so that ``x + LS1 * (pool(N(x)) - N(x))`` is an interpolation between x and pool(x) by ``LS1 * gamma * rstd``. The
gradient of beta is exactly zero, which the plain form reaches only up to rounding.

Second half. gamma and beta go into the first convolution. LayerScale does not go into the second: at 1e-5 times a
weight float16 would lose it. The backward pass needs the input, its mean and rstd, and the MLP's pre-activation; the
gradient of LayerScale follows from that of the second convolution (a: its input, g: the gradient of the output):

    d LS2[c] = sum of g[c] * (W2 a + b2)[c] = sum_k W2[c, k] * (g a^T)[c, k] + b2[c] * sum of g[c]

Statistics and sums over positions are in float32 at least; the matrix products follow autocast.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

CACHED = 2**24
"""Bytes of the MLP's hidden channels that a CPU trains on at once: they stay in its cache, and below the 32 MiB from
which the C library asks the kernel for every buffer anew, page by page."""


class Statistics(NamedTuple):
    """Mean and 1 / standard deviation of each sample, (B, 1) each."""

    mean: Tensor
    rstd: Tensor


def pooling_half(
    x: Tensor, gamma: Tensor, beta: Tensor, layer_scale: Tensor | None, keep: Tensor | None, pool_size: int, eps: float
) -> Tensor:
    """``x + keep * LS1 * (pool(N(x)) - N(x))`` for maps (B, C, H, W) (Eqs. 2 and 4).

    Args:
        gamma, beta: affine of the norm, (C,).
        layer_scale: LS1, (C,), or ``None``.
        keep: drop path's factor per sample, (B, 1, 1, 1), or ``None``.
        pool_size: side of the pooling, odd; the border is not counted.
        eps: added to the variance.
    """
    x = channels_last(x.to(torch.promote_types(x.dtype, gamma.dtype)))
    with without_autocast(x):
        if torch.is_grad_enabled():
            return PoolingHalf.apply(x, gamma, beta, layer_scale, keep, pool_size, eps)
        return mix(x, factor(gamma, layer_scale, keep), statistics(x, eps)[1].rstd, pool_size)


def mlp_half(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    layer_scale: Tensor | None,
    keep: Tensor | None,
    eps: float,
    recompute: bool = False,
) -> Tensor:
    """``x + keep * LS2 * (W2 gelu(W1 N(x) + b1) + b2)`` for maps (B, C, H, W) (Eq. 3).

    Args:
        gamma, beta: affine of the norm, (C,).
        w1, b1, w2, b2: weights and biases of the 1x1 convolutions, (K, C, 1, 1), (K,), (C, K, 1, 1) and (C,).
        layer_scale: LS2, (C,), or ``None``.
        keep: drop path's factor per sample, (B, 1, 1, 1), or ``None``.
        eps: added to the variance.
        recompute: compute the pre-activation anew in the backward pass instead of keeping its K channels.
    """
    x = channels_last(x.to(torch.promote_types(x.dtype, gamma.dtype)))
    dtype = product_dtype(x)
    with without_autocast(x):
        if torch.is_grad_enabled():
            count = samples_at_once(x, len(w1))
            parts = x.split(count)
            keeps = [None] * len(parts) if keep is None else keep.split(count)
            arguments = (gamma, beta, w1, b1, w2, b2, layer_scale)
            done = [
                MlpHalf.apply(part, *arguments, kept, eps, recompute, dtype)
                for part, kept in zip(parts, keeps, strict=True)
            ]
            return done[0] if len(done) == 1 else torch.cat(done)
        weight, bias = folded(w1.flatten(1), b1, gamma, beta)
        return add_mlp(x, weight, bias, w2.flatten(1), b2, factor(layer_scale, keep), eps, dtype)


def mix(x: Tensor, factor: Tensor, rstd: Tensor, pool_size: int) -> Tensor:
    """From x to pool(x) by ``factor * rstd``."""
    pooled = F.avg_pool2d(x, pool_size, stride=1, padding=pool_size // 2, count_include_pad=False)
    return torch.lerp(x, pooled, (factor * rstd[:, :, None, None]).to(x.dtype))


def add_mlp(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, factor: Tensor | None, eps: float, dtype: torch.dtype
) -> Tensor:
    """``x + factor * (W2 gelu(W1 n + b1) + b2)``, n being x without mean and scale; products in ``dtype``."""
    hidden = pointwise(statistics(x, eps)[0].to(dtype), w1.to(dtype), b1.to(dtype), gelu=True)
    return add(x, factor, pointwise(hidden, w2.to(dtype), b2.to(dtype)))


class PoolingHalf(Function):
    """:func:`pooling_half` with a gradient; keeps its input."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        gamma: Tensor,
        beta: Tensor,
        layer_scale: Tensor | None,
        keep: Tensor | None,
        pool_size: int,
        eps: float,
    ) -> Tensor:
        _, found = statistics(x, eps)
        ctx.save_for_backward(x, gamma, layer_scale, keep, *found)
        ctx.pool_size = pool_size
        return mix(x, factor(gamma, layer_scale, keep), found.rstd, pool_size)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma, layer_scale, keep, *found = ctx.saved_tensors
        with without_autocast(x):
            grad = channels_last(grad)
            scale, rstd = factor(gamma, layer_scale, keep), found[1][:, :, None, None]
            across = pool_transposed(grad, ctx.pool_size) - grad
            normalised = normalise(x, Statistics(*found))
            by_factor = (across * normalised).sum((2, 3), keepdim=True)
            by_rstd = (scale * by_factor).sum(1, keepdim=True) / normalised[0].numel()
            d_x = torch.addcmul(grad, (scale * rstd).to(grad.dtype), across)
            d_x = torch.addcmul(d_x, (rstd * by_rstd).to(grad.dtype), normalised.to(grad.dtype), value=-1)
            by_channel = (by_factor if keep is None else keep * by_factor).sum((0, 2, 3))
            if layer_scale is None:
                return d_x, by_channel, torch.zeros_like(gamma), None, None, None, None
            return d_x, layer_scale * by_channel, torch.zeros_like(gamma), gamma * by_channel, None, None, None


class MlpHalf(Function):
    """:func:`mlp_half` with a gradient; keeps its input and, unless ``recompute``, the MLP's pre-activation."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        gamma: Tensor,
        beta: Tensor,
        w1: Tensor,
        b1: Tensor,
        w2: Tensor,
        b2: Tensor,
        layer_scale: Tensor | None,
        keep: Tensor | None,
        eps: float,
        recompute: bool,
        dtype: torch.dtype,
    ) -> Tensor:
        normalised, found = statistics(x, eps)
        weight, bias = folded(w1.flatten(1), b1, gamma, beta)
        hidden = pointwise(normalised.to(dtype), weight.to(dtype), bias.to(dtype))
        branch = pointwise(F.gelu(hidden), w2.flatten(1).to(dtype), b2.to(dtype))
        kept = None if recompute else hidden
        ctx.save_for_backward(x, gamma, beta, w1, b1, w2, b2, layer_scale, keep, kept, *found)
        ctx.dtype = dtype
        return add(x, factor(layer_scale, keep), branch)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma, beta, weight1, b1, weight2, b2, layer_scale, keep, hidden, *found = ctx.saved_tensors
        w1, w2, dtype = weight1.flatten(1), weight2.flatten(1), ctx.dtype
        with without_autocast(x):
            grad = channels_last(grad)
            normalised = normalise(x, Statistics(*found)).to(dtype)
            weight, bias = folded(w1, b1, gamma, beta)
            if hidden is None:
                hidden = pointwise(normalised, weight.to(dtype), bias.to(dtype))

            kept = grad if keep is None else keep * grad
            scaled = kept if layer_scale is None else factor(layer_scale) * kept
            d_w2 = (rows(kept.to(dtype)).t() @ rows(F.gelu(hidden))).to(w2.dtype)
            d_b2 = rows(kept).sum(0)
            d_scale = None
            if layer_scale is not None:
                d_scale = (d_w2 * w2).sum(1) + d_b2 * b2
                d_w2, d_b2 = layer_scale[:, None] * d_w2, layer_scale * d_b2

            d_hidden = pointwise(scaled.to(dtype), w2.to(dtype).t())
            torch.ops.aten.gelu_backward.grad_input(d_hidden, hidden, grad_input=d_hidden)
            d_b1 = rows(d_hidden).sum(0, dtype=b1.dtype)
            by_normalised = (rows(d_hidden).t() @ rows(normalised)).to(w1.dtype)
            d_w1 = torch.addcmul(d_b1[:, None] * beta, by_normalised, gamma)
            d_gamma, d_beta = (by_normalised * w1).sum(0), d_b1 @ w1
            d_x = statistics_backward(pointwise(d_hidden, weight.to(dtype).t()), x, Statistics(*found))
            d_w1, d_w2 = of_convolution(d_w1, weight1), of_convolution(d_w2, weight2)
            return grad + d_x, d_gamma, d_beta, d_w1, d_b1, d_w2, d_b2, d_scale, None, None, None, None


def statistics(x: Tensor, eps: float) -> tuple[Tensor, Statistics]:
    """x without mean and scale, and what they were; layer norm is here over all of a sample (appendix D)."""
    matrix = samples(x)
    normalised, mean, rstd = torch.native_layer_norm(matrix, matrix.shape[1:], None, None, eps)
    return maps(normalised, x), Statistics(mean, rstd)


def statistics_backward(grad: Tensor, x: Tensor, found: Statistics) -> Tensor:
    """From the gradient of what :func:`statistics` returns first to that of x."""
    matrix, mask = samples(x), [True, False, False]
    backward = torch.ops.aten.native_layer_norm_backward
    d_x, _, _ = backward(samples(grad), matrix, matrix.shape[1:], found.mean, found.rstd, None, None, mask)
    return maps(d_x, x).to(x.dtype)


def normalise(x: Tensor, found: Statistics) -> Tensor:
    return maps((samples(x) - found.mean) * found.rstd, x)


def of_convolution(grad: Tensor, weight: Tensor) -> Tensor:
    """The gradient (K, C) of a weight (K, C, 1, 1), with the weight's strides, as DistributedDataParallel wants it."""
    return grad.as_strided(weight.shape, (*grad.stride(), *weight.stride()[2:]))


def folded(w1: Tensor, b1: Tensor, gamma: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Weight (K, C) and bias (K,) of the first convolution after a norm without affine."""
    return w1 * gamma, torch.addmv(b1, w1, beta)


def factor(*factors: Tensor | None) -> Tensor | None:
    """The product of factors per channel (C,) or per sample (B, 1, 1, 1), to multiply maps with."""
    product = None
    for one in factors:
        if one is not None:
            one = one[:, None, None] if one.ndim == 1 else one
            product = one if product is None else product * one
    return product


def add(x: Tensor, factor: Tensor | None, branch: Tensor) -> Tensor:
    branch = branch.to(x.dtype)
    return x + branch if factor is None else torch.addcmul(x, factor.to(x.dtype), branch)


def pool_transposed(grad: Tensor, size: int) -> Tensor:
    """The transpose of the pooling: divide by the number of positions that were counted, then sum."""
    ones = grad.new_ones(1, 1, *grad.shape[2:])
    counted = F.avg_pool2d(ones, size, stride=1, padding=size // 2, divisor_override=1)
    return F.avg_pool2d(grad / counted, size, stride=1, padding=size // 2, divisor_override=1)


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None, gelu: bool = False) -> Tensor:
    """A 1x1 convolution of maps (B, C, H, W) with a weight (K, C), and GELU.

    On a CPU oneDNN is faster in float32 than the BLAS behind ``F.linear`` and applies GELU as it writes; inductor
    reaches oneDNN through a convolution.
    """
    on_cpu = x.device.type == "cpu"
    if on_cpu and (torch.compiler.is_compiling() or torch.jit.is_tracing()):
        product = F.conv2d(x, weight[:, :, None, None], bias)
    elif on_cpu and x.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        epilogue = ("gelu", [], "none") if gelu else ("none", [], "")
        return maps(torch.ops.mkldnn._linear_pointwise(rows(x), weight, bias, *epilogue), x)
    else:
        product = maps(F.linear(rows(x), weight, bias), x)
    return F.gelu(product) if gelu else product


def samples_at_once(x: Tensor, channels: int) -> int:
    """How many samples of maps (B, C, H, W) the MLP half takes at once, where its hidden maps have ``channels``."""
    if x.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return len(x)
    sample = channels * x.shape[2] * x.shape[3] * x.element_size()
    return max(1, min(len(x), CACHED // sample))


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def rows(x: Tensor) -> Tensor:
    """Maps (B, C, H, W) as a matrix (B * H * W, C); channels-last maps are not copied."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def samples(x: Tensor) -> Tensor:
    """Maps (B, C, H, W) as a matrix (B, H * W * C), in float32 at least."""
    return x.permute(0, 2, 3, 1).flatten(1).to(torch.promote_types(x.dtype, torch.float32))


def maps(matrix: Tensor, like: Tensor) -> Tensor:
    """What :func:`rows` or :func:`samples` makes of maps of the size of ``like``, as maps again."""
    batch, _, height, width = like.shape
    return matrix.view(batch, height, width, -1).permute(0, 3, 1, 2)


def product_dtype(x: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype(x.device.type) if autocasts(x) else x.dtype


def without_autocast(x: Tensor) -> AbstractContextManager:
    """In the halves each operator's type is said; autocast would put sums into half precision."""
    return torch.autocast(x.device.type, enabled=False) if autocasts(x) else nullcontext()


def autocasts(x: Tensor) -> bool:
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
