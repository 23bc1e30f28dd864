"""The operations of the fused and folded forms of a block (see :mod:`metaformer.fused`).

Shapes: B images, C channels, H x W positions, K output channels; maps are (B, C, H, W) and channels-last.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import reduce

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

Statistics = tuple[Tensor, Tensor]
"""Mean and 1 / standard deviation of each sample, (B, 1) each."""
AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
"""Whether PyTorch uses AVX-512 on this machine."""


def mix(x: Tensor, factor: Tensor, rstd: Tensor, pool_size: int) -> Tensor:
    """Interpolate from x to pool(x) by ``factor * rstd``."""
    pooled = F.avg_pool2d(x, pool_size, stride=1, padding=pool_size // 2, count_include_pad=False)
    return torch.lerp(x, pooled, (factor * rstd[:, :, None, None]).to(x.dtype))


def add_mlp(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, factor: Tensor | None, eps: float, dtype: torch.dtype
) -> Tensor:
    """``x + factor * (W2 gelu(W1 n + b1) + b2)``, n being the normalised x; products in ``dtype``."""
    hidden = pointwise(statistics(x, eps)[0].to(dtype), w1.to(dtype), b1.to(dtype), activate=True)
    return add(x, factor, pointwise(hidden, w2.to(dtype), b2.to(dtype)))


def moments(x: Tensor, eps: float) -> Statistics:
    """Statistics of each sample over channels and positions (appendix D)."""
    matrix = samples(x)
    if splits_samples(x):
        variance, mean = torch.var_mean(matrix, 1, correction=0, keepdim=True)
        return mean, torch.rsqrt(variance + eps)
    return torch.native_layer_norm(matrix, matrix.shape[1:], None, None, eps)[1:]


def statistics(x: Tensor, eps: float) -> tuple[Tensor, Statistics]:
    """Maps normalised by their :func:`moments`, and these."""
    if splits_samples(x):
        found = moments(x, eps)
        return normalise(x, found), found
    matrix = samples(x)
    normalised, mean, rstd = torch.native_layer_norm(matrix, matrix.shape[1:], None, None, eps)
    return maps_of_samples(normalised, x), (mean, rstd)


def statistics_backward(grad: Tensor, x: Tensor, found: Statistics) -> Tensor:
    """The gradient of x from that of the normalised x."""
    grad = samples(grad)
    if splits_samples(x):
        normalised, rstd = samples(normalise(x, found)), found[1]
        d_x = torch.addcmul(-rstd * grad.mean(1, keepdim=True), grad, rstd)
        d_x = torch.addcmul(d_x, normalised, -rstd * (grad * normalised).mean(1, keepdim=True))
    else:
        matrix, mask = samples(x), [True, False, False]
        backward = torch.ops.aten.native_layer_norm_backward
        d_x, _, _ = backward(grad, matrix, matrix.shape[1:], *found, None, None, mask)
    return maps_of_samples(d_x, x).to(x.dtype)


def splits_samples(x: Tensor) -> bool:
    """Whether to use operators that share a sample among a GPU's blocks; its layer norm takes one block per sample."""
    return x.is_cuda


def normalise(x: Tensor, found: Statistics) -> Tensor:
    mean, rstd = found
    if splits_samples(x):  # one pass; on a CPU, this operator is slower than the two below
        return maps_of_samples(torch.addcmul(-mean * rstd, samples(x), rstd), x)
    return maps_of_samples((samples(x) - mean) * rstd, x)


def of_convolution(grad: Tensor, weight: Tensor) -> Tensor:
    """The gradient (K, C) of a weight (K, C, 1, 1), with the weight's strides, as DistributedDataParallel wants it."""
    return grad.as_strided(weight.shape, (*grad.stride(), *weight.stride()[2:]))


def folded(w1: Tensor, b1: Tensor, gamma: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Weight (K, C) and bias (K,) of the first convolution after a norm without affine."""
    return w1 * gamma, torch.addmv(b1, w1, beta)


def factor(*factors: Tensor | None) -> Tensor | None:
    """The product of factors per channel (C,) or per sample (B, 1, 1, 1), to multiply maps with."""
    given = [one[:, None, None] if one.ndim == 1 else one for one in factors if one is not None]
    return reduce(torch.mul, given) if given else None


def add(x: Tensor, factor: Tensor | None, branch: Tensor) -> Tensor:
    branch = branch.to(x.dtype)
    return x + branch if factor is None else torch.addcmul(x, factor.to(x.dtype), branch)


def pool_transposed(grad: Tensor, size: int) -> Tensor:
    """The transpose of the pooling: divide by the number of positions that were counted, then sum."""
    ones = grad.new_ones(1, 1, *grad.shape[2:])
    counted = F.avg_pool2d(ones, size, stride=1, padding=size // 2, divisor_override=1)
    return F.avg_pool2d(grad / counted, size, stride=1, padding=size // 2, divisor_override=1)


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None, activate: bool = False) -> Tensor:
    """A 1x1 convolution of maps (B, C, H, W) with a weight (K, C), and GELU if ``activate``.

    On a CPU oneDNN is faster than the BLAS behind ``F.linear`` in float32, and applies GELU as it writes. Its linear is
    faster than its convolution with AVX-512 only, and then multiplies bfloat16 too. inductor reaches oneDNN through the
    convolution only.
    """
    on_cpu, onednn = x.device.type == "cpu", torch.backends.mkldnn
    dtypes = (torch.float32, torch.bfloat16) if AVX512 else (torch.float32,)
    if (on_cpu and torch.compiler.is_compiling()) or may_use_tf32(x):
        product = F.conv2d(x, weight[:, :, None, None], bias)
    elif on_cpu and x.dtype in dtypes and onednn.is_available() and onednn.enabled:
        epilogue = ("gelu", [], "none") if activate else ("none", [], "")
        bias = None if bias is None else bias.contiguous()  # these operators ignore its stride
        if AVX512:
            return maps(torch.ops.mkldnn._linear_pointwise(rows(x), weight, bias, *epilogue), x)
        geometry = ([0, 0], [1, 1], [1, 1], 1)
        return torch.ops.mkldnn._convolution_pointwise(x, weight[:, :, None, None], bias, *geometry, *epilogue)
    else:
        product = maps(F.linear(rows(x), weight, bias), x)
    return torch.ops.aten.gelu_(product) if activate else product


def gelu(x: Tensor) -> Tensor:
    """GELU of channels-last maps, as a matrix: on a CPU, PyTorch uses oneDNN for contiguous tensors only."""
    return maps(F.gelu(rows(x)), x)


def gelu_backward(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of x from that of :func:`gelu`, in its memory."""
    grad = rows(channels_last(grad))
    return maps(torch.ops.aten.gelu_backward.grad_input(grad, rows(x), grad_input=grad), x)


def pointwise_weight(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of the weight (K, C) of :func:`pointwise` from that of its output (B, K, H, W)."""
    if may_use_tf32(x):
        weight, geometry = x.new_empty(grad.shape[1], x.shape[1], 1, 1), ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)
        backward = torch.ops.aten.convolution_backward
        return backward(grad, x, weight, None, *geometry, [False, True, False])[1].flatten(1)
    return rows(grad).t() @ rows(x)


def may_use_tf32(x: Tensor) -> bool:
    """Whether a convolution of ``x`` may use TF32: PyTorch allows it there by default, and not in matrix products."""
    return x.is_cuda and x.dtype == torch.float32


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def rows(x: Tensor) -> Tensor:
    """Maps (B, C, H, W) as a matrix (B * H * W, C); channels-last maps are not copied."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def samples(x: Tensor) -> Tensor:
    """Maps (B, C, H, W) as a matrix (B, H * W * C), in float32 at least."""
    return x.permute(0, 2, 3, 1).flatten(1).to(torch.promote_types(x.dtype, torch.float32))


def maps(matrix: Tensor, like: Tensor) -> Tensor:
    """A matrix (B * H * W, K) as maps (B, K, H, W), with B, H and W of ``like``."""
    batch, _, height, width = like.shape
    return matrix.view(batch, height, width, matrix.shape[1]).permute(0, 3, 1, 2)


def maps_of_samples(matrix: Tensor, like: Tensor) -> Tensor:
    """A matrix (B, H * W * C) as maps of the shape of ``like``."""
    return maps(matrix.view(-1, like.shape[1]), like)


def product_dtype(x: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype(x.device.type) if autocasts(x) else x.dtype


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Disable autocast, which would compute sums in half precision; the fused form chooses each operator's dtype."""
    return torch.autocast(x.device.type, enabled=False) if autocasts(x) else nullcontext()


def autocasts(x: Tensor) -> bool:
    """Whether autocast is enabled on the device of ``x`` and applies to it; it leaves float64 as it is."""
    device, double = x.device.type, x.dtype == torch.float64
    return not double and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def transformed(x: Tensor) -> bool:
    """Whether vmap, another torch.func transform or forward-mode AD is active, which custom functions do not support.

    PyTorch has no public function for this; these are the ones that ``torch.autograd`` itself uses.
    """
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return True
    return not torch.compiler.is_compiling() and torch._C._functorch.is_legacy_batchedtensor(x)
