"""Token mixers: modules from (B, C, H, W) to the same shape that move information between positions."""

import torch
import torch.fx
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
        dim: number of channels C; unused here, but every mixer takes it.
        pool_size: side of the neighbourhood in positions, odd.
        subtract: ``False`` leaves out the subtraction.
        count_border: ``True`` counts positions outside the map as zeros.

    Raises:
        InputError: ``pool_size`` is even, so that the neighbourhood has no centre.
    """

    def __init__(self, dim: int, pool_size: int = 3, subtract: bool = True, count_border: bool = False):
        super().__init__()
        if pool_size < 1 or pool_size % 2 == 0:
            raise InputError(f"pool_size is {pool_size}: use an odd number, so that the map keeps its size")
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
    """``W x`` over the N = H * W positions with a fixed random N x N matrix W (section 4.4).

    W is drawn from [0, 1), followed by a softmax over each row, and gets no gradient, even after
    ``requires_grad_()``. The input is not subtracted.

    Args:
        dim: number of channels C, which share the matrix.
        map_size: H and W of the maps.

    Raises:
        InputError: in the forward pass, for maps of another size.
    """

    def __init__(self, dim: int, map_size: Size):
        super().__init__()
        self.map_size = tuple(map_size)
        positions = map_size[0] * map_size[1]
        self.weight = nn.Parameter(torch.rand(positions, positions).softmax(dim=-1), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        check_map_size(x, self.map_size, "RandomMixing")
        return F.linear(positions_last(x), self.weight.detach()).view(x.shape)


class SpatialFC(nn.Module):
    """One linear layer over the N = H * W positions, shared by the channels, without bias (section 4.4).

    Args:
        dim: number of channels C; the weights do not depend on it.
        map_size: H and W of the maps.

    Raises:
        InputError: in the forward pass, for maps of another size.
    """

    def __init__(self, dim: int, map_size: Size):
        super().__init__()
        self.map_size = tuple(map_size)
        positions = map_size[0] * map_size[1]
        self.fc = nn.Linear(positions, positions, bias=False)
        trunc_normal_(self.fc.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        check_map_size(x, self.map_size, "SpatialFC")
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
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.proj(mixed).transpose(1, 2).reshape(x.shape)


class PositionEmbedding(nn.Module):
    """A learned vector per position, initially zero, added to the maps (section 4.4): (B, C, H, W) to the same shape.

    Raises:
        InputError: in the forward pass, for maps of another size than ``map_size``.
    """

    def __init__(self, dim: int, map_size: Size):
        super().__init__()
        self.map_size = tuple(map_size)
        self.pos_embed = nn.Parameter(torch.zeros(1, dim, *map_size))

    def forward(self, x: Tensor) -> Tensor:
        check_map_size(x, self.map_size, "PositionEmbedding")
        return x + self.pos_embed


def positions_last(x: Tensor) -> Tensor:
    """Maps (B, C, H, W) as (B, C, N), contiguous.

    This is always a copy. A compiled graph assumes that the group norm of channels-last maps returns contiguous ones,
    and would remove a call of ``contiguous``.
    """
    return x.clone(memory_format=torch.contiguous_format).flatten(2)


@torch.fx.wrap
def check_map_size(x: Tensor, size: Size, module: str) -> None:
    """Raise an ``InputError`` if maps do not have the size (H, W) that the module was made for."""
    if x.shape[-2] != size[0] or x.shape[-1] != size[1]:
        raise InputError(
            f"{module} is made for maps of {size[0]} x {size[1]} positions and got {x.shape[-2]} x {x.shape[-1]}: "
            "build the model with img_size=(height, width) of its images"
        )
