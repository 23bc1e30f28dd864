"""The fused form of a block of pooling and MLP: the same function in fewer passes over memory.

Shapes: B images, C channels, H x W positions, K hidden channels of the MLP. Maps are (B, C, H, W) and kept
channels-last, so that a map is also a matrix of B * H * W rows and C columns, and a 1x1 convolution a matrix product.

First half. An average that does not count its border maps a constant to itself. With ``N(x) = gamma * (x - mean) * rstd
+ beta`` (MLN: one mean and one rstd per sample), mean and beta cancel in the mixer:

    pool(N(x)) - N(x) = gamma * rstd * (pool(x) - x)

so that ``x + LS1 * (pool(N(x)) - N(x))`` interpolates between x and pool(x) by ``LS1 * gamma * rstd``. The gradient of
beta is exactly zero, which the plain form reaches only up to rounding.

Second half. gamma and beta are folded into the first convolution. LayerScale is not folded into the second one: float16
would lose a weight multiplied by 1e-5. The backward pass needs the input, its mean and rstd, and the MLP's
pre-activation. The gradient of LayerScale follows from that of the second convolution (a: its input, g: the gradient of
the output):

    d LS2[c] = sum of g[c] * (W2 a + b2)[c] = sum_k W2[c, k] * (g a^T)[c, k] + b2[c] * sum of g[c]

Statistics and sums over positions are at least in float32; the matrix products follow autocast.
"""

from collections.abc import Callable, Sequence
from functools import partial, wraps

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook

from metaformer import kernels
from metaformer.block import MLN, ChannelMlp, MetaFormerBlock
from metaformer.mixers import Pooling

CACHED = 2**24
"""Bytes of the MLP's hidden maps that a CPU computes at once in training. They fit its cache, and stay below the 32 MiB
from which the C library requests every buffer from the kernel anew. If the whole batch has no more, GELU's output is
kept for the backward pass as well, because computing it again takes longer than memory of this size is worth."""


class FusedBlock(MetaFormerBlock):
    """A :class:`MetaFormerBlock` that computes its fused form where :func:`applies` allows it, else its plain form."""

    # TorchScript compiles the source of the wrapped function, the plain form.
    @wraps(MetaFormerBlock.forward)
    def forward(self, x: Tensor) -> Tensor:
        if applies(self, x) and not plain_is_faster(x):
            return self.fused(x)
        return super().forward(x)

    def fused(self, x: Tensor) -> Tensor:
        norm1, norm2, mlp = self.norm1, self.norm2, self.mlp
        x = kernels.channels_last(x.to(norm1.weight.dtype))
        pool_size = self.token_mixer.pool.kernel_size
        with kernels.without_autocast(x):
            inputs = (x, norm1.weight, norm1.bias, self.layer_scale1)
            x = PoolingHalf.apply(self.keep(x), pool_size, norm1.eps, *inputs)
        weights = (mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias, self.layer_scale2)
        return mlp_half(x, (norm2.weight, norm2.bias, *weights), self.keep(x), norm2.eps, self.recompute)

    def keep(self, x: Tensor) -> Tensor | None:
        """The factor per sample (B, 1, 1, 1) by which drop path multiplies a branch, or ``None``."""
        if isinstance(self.drop_path, nn.Identity) or not self.drop_path.training:
            return None
        return self.drop_path(x.new_ones(x.shape[0], 1, 1, 1))


EXPECTED = {
    MetaFormerBlock: {},
    FusedBlock: {},
    MLN: {"num_groups": 1},
    Pooling: {"subtract": True},
    nn.AvgPool2d: {"stride": 1, "ceil_mode": False, "count_include_pad": False, "divisor_override": None},
    ChannelMlp: {},
    nn.Conv2d: {"stride": (1, 1), "padding": (0, 0)},
    nn.GELU: {"approximate": "none"},
    DropPath: {},
    nn.Identity: {},
}
"""The classes of blocks and parts that can be fused, and attributes that they must have."""
FORWARD = {kind: kind.forward for kind in EXPECTED}
PLAIN, ADD = MetaFormerBlock.plain, MetaFormerBlock.add


def applies(block: MetaFormerBlock, x: Tensor) -> bool:
    """Whether the fused form computes the same as the plain form for maps ``x``."""
    # Proxies of torch.fx and subclasses of Tensor take the plain form. So do exported and traced graphs, which should
    # consist of common operators.
    if type(x) is not Tensor or torch.compiler.is_exporting() or torch.jit.is_tracing():
        return False
    if kernels.transformed(x) or _has_any_global_hook() or not fusable(block):
        return False
    gamma = block.norm1.weight
    if x.ndim != 4 or x.shape[1] != len(gamma) or x.device != gamma.device:
        return False
    if kernels.autocasts(x):
        return gamma.dtype == torch.float32 and x.dtype in (torch.float32, kernels.product_dtype(x))
    return x.dtype == gamma.dtype


def plain_is_faster(x: Tensor) -> bool:
    """Whether the plain form of maps ``x`` is the faster one, which it is on a CPU only.

    torch.compile fuses the plain form itself, and chooses better what to keep for the backward pass. The fused form
    saves passes over maps and adds passes over the weights. These are larger if the maps have fewer than two positions
    for each channel, summed over the batch.
    """
    return x.device.type == "cpu" and (torch.compiler.is_compiling() or x.numel() < 2 * x.shape[1] ** 2)


def fusable(block: MetaFormerBlock) -> bool:
    """Whether a block is pooling and a GELU MLP, both behind MLN, as printed, with unchanged parts without hooks."""
    kind, own = type(block), vars(block)
    if kind.plain is not PLAIN or kind.add is not ADD or "plain" in own or "add" in own:
        return False
    norm1, norm2, mixer, mlp = block.norm1, block.norm2, block.token_mixer, block.mlp
    if not (block.residual and unchanged(mixer, Pooling) and unchanged(mlp, ChannelMlp)):
        return False
    pool, fc1, fc2 = mixer.pool, mlp.fc1, mlp.fc2
    parts = ((norm1, MLN), (norm2, MLN), (pool, nn.AvgPool2d), (fc1, nn.Conv2d), (mlp.act, nn.GELU), (fc2, nn.Conv2d))
    if not all(unchanged(*part) for part in (*parts, (block.drop_path, DropPath, nn.Identity))):
        return False
    if not isinstance(pool.kernel_size, int) or pool.kernel_size % 2 == 0 or pool.padding != pool.kernel_size // 2:
        return False
    # The fused form takes ordinary tensors of one dtype and of these shapes, not sharded, quantised or broadcast ones.
    gamma, w1, b1, w2 = norm1.weight, fc1.weight, fc1.bias, fc2.weight
    vectors = [gamma, norm1.bias, norm2.weight, norm2.bias, fc2.bias]
    vectors += [scale for scale in (block.layer_scale1, block.layer_scale2) if scale is not None]
    if any(type(tensor) not in (nn.Parameter, Tensor) for tensor in (*vectors, w1, b1, w2)):
        return False
    channels, hidden, dtype = gamma.numel(), b1.numel(), w1.dtype
    if w1.shape != (hidden, channels, 1, 1) or w2.shape != (channels, hidden, 1, 1) or b1.shape != (hidden,):
        return False
    return b1.dtype == w2.dtype == dtype and all(v.shape == (channels,) and v.dtype == dtype for v in vectors)


def unchanged(module: nn.Module | None, *kinds: type[nn.Module]) -> bool:
    """Whether ``module`` is exactly one of ``kinds`` with the expected attributes, its own forward pass and no hooks.

    A parametrised module is of another class. Pruning and the older weight and spectral norm are hooks.
    """
    kind = type(module)
    if kind not in kinds or "forward" in vars(module) or kind.forward is not FORWARD[kind]:
        return False
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return False
    return all(getattr(module, name) == value for name, value in EXPECTED[kind].items())


def mlp_half(
    x: Tensor, weights: Sequence[Tensor | None], keep: Tensor | None, eps: float, recompute: bool = False
) -> Tensor:
    """``x + keep * LS2 * (W2 gelu(W1 N(x) + b1) + b2)`` for channels-last maps (B, C, H, W) (Eq. 3).

    Args:
        weights: gamma and beta of the norm, (C,) each; W1 (K, C, 1, 1), b1 (K,), W2 (C, K, 1, 1), b2 (C,); LS2, (C,) or
            ``None``.
        keep: drop path's factor per sample, (B, 1, 1, 1), or ``None``.
        eps: added to the variance.
        recompute: compute the K channels of the hidden layer again in the backward pass instead of keeping them.
    """
    gamma, beta, w1, b1, w2, b2, layer_scale = weights
    dtype = kernels.product_dtype(x)
    with kernels.without_autocast(x):
        if not torch.is_grad_enabled():
            weight, bias = kernels.folded(w1.flatten(1), b1, gamma, beta)
            return kernels.add_mlp(x, weight, bias, w2.flatten(1), b2, kernels.factor(layer_scale, keep), eps, dtype)
        on_cpu = x.device.type == "cpu"
        sample = len(w1) * x.shape[2:].numel() * dtype.itemsize
        small = len(x) * sample <= CACHED
        arguments = (eps, 0 if recompute else 2 if on_cpu and small else 1, dtype, *weights)
        if not on_cpu or small:
            return MlpHalf.apply(x, keep, *arguments)
        parts = x.split(max(1, CACHED // sample))
        keeps = [None] * len(parts) if keep is None else keep.split(len(parts[0]))
        return torch.cat([MlpHalf.apply(*given, *arguments) for given in zip(parts, keeps, strict=True)])


class PoolingHalf(Function):
    """``x + keep * LS1 * (pool(N(x)) - N(x))`` for channels-last maps (B, C, H, W) (Eqs. 2 and 4); keeps its input.

    Args:
        keep: drop path's factor per sample, (B, 1, 1, 1), or ``None``.
        pool_size: side of the pooling, odd; the border is not counted.
        eps: added to the variance.
        inputs: x; gamma and beta of the norm, (C,) each; LS1, (C,), or ``None``.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, keep: Tensor | None, pool_size: int, eps: float, *inputs: Tensor | None) -> Tensor:
        x, gamma, _, layer_scale = inputs
        found = kernels.moments(x, eps)
        ctx.save_for_backward(keep, *found, *inputs)
        ctx.pool_size, ctx.eps = pool_size, eps
        return kernels.mix(x, kernels.factor(gamma, layer_scale, keep), found[1], pool_size)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        keep, *found, x, gamma, beta, layer_scale = ctx.saved_tensors
        with kernels.without_autocast(x):
            if torch.is_grad_enabled() or kernels.transformed(grad):
                inputs, needed = (x, gamma, beta, layer_scale), ctx.needs_input_grad[3:]
                equation = partial(plain_pooling_half, keep, ctx.pool_size, ctx.eps)
                return None, None, None, *plain_gradients(equation, inputs, needed, grad)
            grad = kernels.channels_last(grad)
            scale, rstd = kernels.factor(gamma, layer_scale, keep), found[1][:, :, None, None]
            across = kernels.pool_transposed(grad, ctx.pool_size) - grad
            normalised = kernels.normalise(x, found)
            by_factor = (across * normalised).sum((2, 3), keepdim=True)
            by_rstd = (scale * by_factor).sum(1, keepdim=True) / x.shape[1:].numel()
            d_x = torch.addcmul(grad, (scale * rstd).to(grad.dtype), across)
            d_x = torch.addcmul(d_x, (rstd * by_rstd).to(grad.dtype), normalised.to(grad.dtype), value=-1)
            by_channel = (by_factor if keep is None else keep * by_factor).sum((0, 2, 3))
            d_gamma = by_channel if layer_scale is None else layer_scale * by_channel
            d_scale = None if layer_scale is None else gamma * by_channel
            return None, None, None, d_x, d_gamma, torch.zeros_like(beta), d_scale


class MlpHalf(Function):
    """:func:`mlp_half` with a gradient; keeps its input and the first ``kept`` of pre-activation and GELU's output."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, keep: Tensor | None, eps: float, kept: int, dtype: torch.dtype, *weights: Tensor
    ) -> Tensor:
        gamma, beta, w1, b1, w2, b2, layer_scale = weights
        normalised, found = kernels.statistics(x, eps)
        weight, bias = kernels.folded(w1.flatten(1), b1, gamma, beta)
        hidden = kernels.pointwise(normalised.to(dtype), weight.to(dtype), bias.to(dtype))
        active = kernels.gelu(hidden)
        branch = kernels.pointwise(active, w2.flatten(1).to(dtype), b2.to(dtype))
        maps = (hidden if kept > 0 else None, active if kept > 1 else None)
        ctx.save_for_backward(keep, *found, *maps, x, *weights)
        ctx.eps, ctx.dtype = eps, dtype
        return kernels.add(x, kernels.factor(layer_scale, keep), branch)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        keep, mean, rstd, hidden, active, *inputs = ctx.saved_tensors
        x, gamma, beta, weight1, b1, weight2, b2, layer_scale = inputs
        w1, w2, dtype, found = weight1.flatten(1), weight2.flatten(1), ctx.dtype, (mean, rstd)
        if torch.is_grad_enabled() or kernels.transformed(grad):
            needed = (ctx.needs_input_grad[0], *ctx.needs_input_grad[5:])
            with torch.autocast(x.device.type, dtype) if dtype != x.dtype else kernels.without_autocast(x):
                d_x, *others = plain_gradients(partial(plain_mlp_half, keep, ctx.eps), inputs, needed, grad)
            return d_x, None, None, None, None, *others
        with kernels.without_autocast(x):
            grad = kernels.channels_last(grad)
            normalised = kernels.normalise(x, found).to(dtype)
            weight, bias = kernels.folded(w1, b1, gamma, beta)
            if hidden is None:
                hidden = kernels.pointwise(normalised, weight.to(dtype), bias.to(dtype))
            active = kernels.gelu(hidden) if active is None else active

            kept = grad if keep is None else keep * grad
            scaled = kept if layer_scale is None else kernels.factor(layer_scale) * kept
            d_w2 = kernels.pointwise_weight(kept.to(dtype), active).to(w2.dtype)
            d_b2 = kernels.rows(kept).sum(0)
            d_scale = None
            if layer_scale is not None:
                d_scale = (d_w2 * w2).sum(1) + d_b2 * b2
                d_w2, d_b2 = layer_scale[:, None] * d_w2, layer_scale * d_b2

            d_hidden = kernels.gelu_backward(kernels.pointwise(scaled.to(dtype), w2.to(dtype).t()), hidden)
            d_b1 = kernels.rows(d_hidden).sum(0, dtype=b1.dtype)
            by_normalised = kernels.pointwise_weight(d_hidden, normalised).to(w1.dtype)
            d_w1 = torch.addcmul(d_b1[:, None] * beta, by_normalised, gamma)
            d_gamma, d_beta = (by_normalised * w1).sum(0), d_b1 @ w1
            d_x = grad + kernels.statistics_backward(kernels.pointwise(d_hidden, weight.to(dtype).t()), x, found)
            d_w1, d_w2 = kernels.of_convolution(d_w1, weight1), kernels.of_convolution(d_w2, weight2)
            return d_x, None, None, None, None, d_gamma, d_beta, d_w1, d_b1, d_w2, d_b2, d_scale


# The two halves as printed, for derivatives beyond the first


def plain_pooling_half(
    keep: Tensor | None, pool_size: int, eps: float, x: Tensor, gamma: Tensor, beta: Tensor, layer_scale: Tensor | None
) -> Tensor:
    normed = F.group_norm(x, 1, gamma, beta, eps)
    pooled = F.avg_pool2d(normed, pool_size, stride=1, padding=pool_size // 2, count_include_pad=False)
    return kernels.add(x, kernels.factor(layer_scale, keep), pooled - normed)


def plain_mlp_half(keep: Tensor | None, eps: float, x: Tensor, *weights: Tensor | None) -> Tensor:
    gamma, beta, w1, b1, w2, b2, layer_scale = weights
    hidden = F.gelu(F.conv2d(F.group_norm(x, 1, gamma, beta, eps), w1, b1))
    return kernels.add(x, kernels.factor(layer_scale, keep), F.conv2d(hidden, w2, b2))


def plain_gradients(
    equation: Callable[..., Tensor], inputs: Sequence[Tensor | None], needed: Sequence[bool], grad: Tensor
) -> list[Tensor | None]:
    """Gradients of ``equation(*inputs)`` for the ``needed`` inputs; differentiable if grad mode is enabled."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views stop the gradient of one input from reaching another input that it was computed from.
        inputs = [None if tensor is None else tensor.view_as(tensor) for tensor in inputs]
        output = equation(*inputs)
    wanted = [tensor for tensor, needs in zip(inputs, needed, strict=True) if needs]
    found = iter(torch.autograd.grad(output, wanted, grad, create_graph=create_graph))
    return [next(found) if needs else None for needs in needed]
