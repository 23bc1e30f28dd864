"""Token mixers: modules from (B, C, H, W) to the same shape that move information between positions."""

from torch import Tensor, nn


class Pooling(nn.Module):
    """Average over a neighbourhood minus the input itself (Eq. 4); no parameters.

    Positions outside the map are not counted in the average, as in the official code (Eq. 4 as printed divides by
    ``pool_size ** 2`` everywhere).

    Args:
        dim: number of channels C; not needed here, but part of every mixer's signature.
        pool_size: side of the neighbourhood in positions, odd.
    """

    def __init__(self, dim: int, pool_size: int = 3):
        super().__init__()
        self.pool = nn.AvgPool2d(pool_size, stride=1, padding=pool_size // 2, count_include_pad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(x) - x
