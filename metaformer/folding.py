"""Fold everything that does not depend on the image into the weights of a copy of a model for inference."""

from copy import deepcopy

import torch
from torch import Tensor, nn

from metaformer import kernels
from metaformer.block import MetaFormerBlock
from metaformer.errors import InputError
from metaformer.fused import FusedBlock, fusable, plain_mlp_half, plain_pooling_half, unchanged


class FoldedBlock(nn.Module):
    """A block of pooling and MLP (see :mod:`metaformer.fused`) for inference, without the affine part of its norms.

    Args:
        block: one for which :func:`metaformer.fused.fusable` holds; its second convolution shares its memory.
    """

    def __init__(self, block: MetaFormerBlock):
        super().__init__()
        mlp, norm = block.mlp, block.norm2
        like = block.norm1.weight
        weights = (mlp.fc1.weight.flatten(1), mlp.fc1.bias, norm.weight, norm.bias)
        # On the CPU, because not every device has float64.
        w1, b1 = (t.to(like) for t in kernels.folded(*(t.detach().cpu().double() for t in weights)))

        self.pool_size = block.token_mixer.pool.kernel_size
        self.eps = (block.norm1.eps, norm.eps)
        self.mix = nn.Parameter(kernels.factor(like, block.layer_scale1))
        self.w1, self.b1 = nn.Parameter(w1), nn.Parameter(b1)
        self.w2, self.b2 = nn.Parameter(mlp.fc2.weight.flatten(1)), nn.Parameter(mlp.fc2.bias)
        self.scale = nn.Parameter(kernels.factor(torch.ones_like(like), block.layer_scale2))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to the same shape."""
        x = x.to(self.mix.dtype) if kernels.autocasts(x) else x
        if x.ndim != 4 or x.shape[1] != len(self.mix) or x.dtype != self.mix.dtype:
            expected = f"(batch, {len(self.mix)}, height, width) and {self.mix.dtype}"
            raise InputError(f"maps have shape {tuple(x.shape)} and {x.dtype}: expected {expected}")
        # The operators of metaformer.kernels have no derivatives.
        differentiated = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *self.parameters()))
        if differentiated or torch.compiler.is_exporting() or torch.jit.is_tracing() or kernels.transformed(x):
            x = plain_pooling_half(None, self.pool_size, self.eps[0], x, None, None, self.mix)
            w1, w2 = self.w1[:, :, None, None], self.w2[:, :, None, None]
            return plain_mlp_half(None, self.eps[1], x, None, None, w1, self.b1, w2, self.b2, self.scale)
        dtype = kernels.product_dtype(x)
        with kernels.without_autocast(x):
            x = kernels.channels_last(x)
            x = kernels.mix(x, self.mix, kernels.moments(x, self.eps[0])[1], self.pool_size)
            return kernels.add_mlp(x, self.w1, self.b1, self.w2, self.b2, self.scale, self.eps[1], dtype)


def fuse(model: nn.Module) -> nn.Module:
    """A copy of ``model`` for inference with folded blocks: the same function, other names in the state dict.

    Blocks with another mixer, MLP or norm, and blocks whose parts were changed or have hooks, stay as they are. The
    copy is in eval mode, its parameters do not require gradients, and it can be compiled and exported.

    Args:
        model: a :class:`MetaFormer`, any module that contains one, such as a detector, or a block.

    Raises:
        InputError: no block can be folded, or the model cannot be copied.
    """
    try:
        holder = nn.Sequential(deepcopy(model))  # a block alone has a name in it too
    except (RuntimeError, TypeError) as error:
        raise InputError(
            f"{type(model).__name__} cannot be copied: remove what it keeps, such as activations, and make pruning or "
            f"weight norm permanent with torch.nn.utils.prune.remove or remove_weight_norm; {error}"
        ) from error
    blocks = [(n, m) for n, m in holder.named_modules() if unchanged(m, MetaFormerBlock, FusedBlock) and fusable(m)]
    if not blocks:
        raise InputError(
            f"{type(model).__name__} has no block of pooling and a GELU MLP behind MLN, without hooks: there is "
            "nothing to fold"
        )
    for name, block in blocks:
        holder.set_submodule(name, FoldedBlock(block))
    return holder[0].eval().requires_grad_(False)
