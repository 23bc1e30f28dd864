"""Token mixers: modules from (B, C, H, W) to the same shape that move information between positions."""

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

from metaformer.errors import InputError

Size = tuple[int, int]


class Pooling(nn.Module):
    """Average over a neighbourhood minus the input itself (Eq. 4); no parameters.

    Positions outside the map are not counted in the average, as in the official code (Eq. 4 as printed divides by
    ``pool_size ** 2`` everywhere).

    Args:
        dim: number of channels C; not needed here, but part of every mixer's signature.
        pool_size: side of the neighbourhood in positions, odd.
        subtract: ``False`` leaves out the subtraction.
        count_border: ``True`` counts positions outside the map as zeros.
    """

    def __init__(self, dim: int, pool_size: int = 3, subtract: bool = True, count_border: bool = False):
        super().__init__()
        self.pool = nn.AvgPool2d(pool_size, stride=1, padding=pool_size // 2, count_include_pad=count_border)
        self.subtract = subtract

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(x) - x if self.subtract else self.pool(x)


class DepthwiseConv(nn.Conv2d):
    """One 3 x 3 filter per channel, with bias (Table 5).

    The paper gives no kernel size: 3 follows from its 11.9 M parameters, which leave no room for 5. Nor does it say
    whether the input is subtracted as in pooling; not here, where the filter's centre can learn to.
    """

    def __init__(self, dim: int):
        super().__init__(dim, dim, kernel_size=3, padding=1, groups=dim)


class RandomMixing(nn.Module):
    """``W x`` over the N = H * W positions, W an N x N matrix that is drawn once and stays (section 4.4).

    Uniform in [0, 1), then a softmax over each row. The input is not subtracted.

    Args:
        dim: number of channels C, which share the matrix.
        size: H and W of the maps.

    Raises:
        InputError: maps of another size.
    """

    def __init__(self, dim: int, size: Size):
        super().__init__()
        self.size = tuple(size)
        positions = size[0] * size[1]
        self.weight = nn.Parameter(torch.rand(positions, positions).softmax(dim=-1), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        check_size(self, x)
        return F.linear(positions_last(x), self.weight).view(x.shape)


class SpatialFC(nn.Module):
    """One linear layer over the N = H * W positions, shared by the channels, without bias (section 4.4).

    Args:
        dim: number of channels C; the weights do not depend on it.
        size: H and W of the maps.

    Raises:
        InputError: maps of another size.
    """

    def __init__(self, dim: int, size: Size):
        super().__init__()
        self.size = tuple(size)
        positions = size[0] * size[1]
        self.fc = nn.Linear(positions, positions, bias=False)
        trunc_normal_(self.fc.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        check_size(self, x)
        return self.fc(positions_last(x)).view(x.shape)


class Attention(nn.Module):
    """Multi-head self-attention over the positions; no bias in the queries, keys and values (section 4.4).

    Args:
        dim: number of channels C, a multiple of ``head_dim``.
        head_dim: channels of a head.

    Raises:
        InputError: ``dim`` is not a multiple of ``head_dim``.
    """

    def __init__(self, dim: int, head_dim: int = 32):
        super().__init__()
        if dim % head_dim:
            raise InputError(f"attention with {head_dim} channels per head cannot divide {dim} channels")
        self.head_dim = head_dim
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)
        trunc_normal_(self.qkv.weight, std=0.02)
        trunc_normal_(self.proj.weight, std=0.02)
        nn.init.zeros_(self.proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)  # (B, N, C)
        qkv = self.qkv(tokens).unflatten(-1, (3, -1, self.head_dim))  # (B, N, 3, heads, head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.proj(mixed).transpose(1, 2).reshape(x.shape)


def positions_last(x: Tensor) -> Tensor:
    """Maps (B, C, H, W) as (B, C, N), contiguous.

    Always a copy: in a compiled graph group norm of channels-last maps is taken to return contiguous ones, so that
    ``contiguous`` would be left out.
    """
    return x.clone(memory_format=torch.contiguous_format).flatten(2)


def check_size(module: nn.Module, x: Tensor) -> None:
    """Refuse a map that is not of the size (H, W) that ``module`` was made for."""
    size = tuple(x.shape[-2:])
    if size != module.size:
        raise InputError(
            f"{type(module).__name__} is made for maps of {module.size[0]} x {module.size[1]} positions and got "
            f"{size[0]} x {size[1]}: build the model with img_size=(height, width) of its images"
        )
