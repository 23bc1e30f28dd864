"""A model for inference, with what does not depend on the image computed once."""

from copy import deepcopy

import torch
from torch import Tensor, nn

from metaformer.errors import InputError
from metaformer.fused import add_mlp, channels_last, folded, mix, product_dtype, statistics, without_autocast
from metaformer.model import MetaFormerBlock


class FoldedBlock(nn.Module):
    """A block of pooling and MLP (see :mod:`metaformer.fused`) for inference: no affine of a norm is left.

    Args:
        block: one whose two halves are both fusable.
    """

    def __init__(self, block: MetaFormerBlock):
        super().__init__()
        mlp, norm = block.mlp, block.norm2
        like = block.norm1.weight
        weights = (mlp.fc1.weight.flatten(1), mlp.fc1.bias, norm.weight, norm.bias)
        w1, b1 = (t.to(like.dtype) for t in folded(*(t.detach().double() for t in weights)))
        ones = torch.ones_like(like)
        scale1, scale2 = (ones if s is None else s for s in (block.layer_scale1, block.layer_scale2))

        self.pool_size = block.token_mixer.pool.kernel_size
        self.eps = (block.norm1.eps, norm.eps)
        self.mix = constant((like * scale1)[:, None, None])
        self.w1, self.b1 = constant(w1), constant(b1)
        self.w2, self.b2 = constant(mlp.fc2.weight.flatten(1)), constant(mlp.fc2.bias)
        self.scale = constant(scale2[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to the same."""
        x = channels_last(x.to(torch.promote_types(x.dtype, self.mix.dtype)))
        dtype = product_dtype(x)
        with without_autocast(x):
            x = mix(x, self.mix, statistics(x, self.eps[0])[1].rstd, self.pool_size)
            return add_mlp(x, self.w1, self.b1, self.w2, self.b2, self.scale, self.eps[1], dtype)


def constant(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().clone(), requires_grad=False)


def fuse(model: nn.Module) -> nn.Module:
    """A copy of ``model`` for inference, its blocks folded; the same function, other names in the state dict.

    Blocks that :attr:`MetaFormerBlock.fusable` does not name as a whole stay as they are. The copy is in eval mode,
    takes no gradient for the folded weights, and can be compiled and exported.

    Args:
        model: a :class:`MetaFormer`, or any module that has one in it, such as a detector.

    Raises:
        InputError: it has no block of pooling and MLP with MLN.
    """
    model = deepcopy(model).eval()
    blocks = [(name, m) for name, m in model.named_modules() if isinstance(m, MetaFormerBlock) and all(m.fusable)]
    if not blocks:
        raise InputError(
            f"{type(model).__name__} has no block of pooling and a GELU MLP behind MLN, without hooks: there is "
            "nothing to fold"
        )
    for name, block in blocks:
        model.set_submodule(name, FoldedBlock(block))
    return model
