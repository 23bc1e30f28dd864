"""The MetaFormer block (arXiv 2111.11418, section 3.1) and its norms and channel MLP.

Shapes: B images, C channels, H x W positions; every feature map is (B, C, H, W).
"""

from collections.abc import Callable
from itertools import count

import torch
import torch.fx
from timm.layers import DropPath, LayerNorm2d, trunc_normal_
from timm.models import checkpoint
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.stateless import _reparametrize_module  # of torch.func.functional_call

from metaformer.errors import InputError
from metaformer.mixers import Pooling

Layer = Callable[[int], nn.Module]
"""Makes a layer for a number of channels: a class, a ``functools.partial`` or a function."""


class MLN(nn.GroupNorm):
    """Modified Layer Normalization: over channels and positions of a sample, affine per channel (appendix D)."""

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__(1, dim, eps=eps)


class ChannelLayerNorm(LayerNorm2d):
    """Layer normalization over the channels of each position, affine per channel (appendix D)."""

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__(dim, eps=eps)


class ChannelMlp(nn.Module):
    """Two 1x1 convolutions with an activation between them (Eq. 3): (B, C, H, W) to the same shape."""

    def __init__(self, dim: int, act_layer: Callable[[], nn.Module] = nn.GELU, ratio: float = 4):
        super().__init__()
        hidden = int(dim * ratio)
        if hidden < 1:
            raise InputError(f"mlp_ratio={ratio} leaves no hidden channel: use a larger one, or None for no MLP")
        self.fc1 = nn.Conv2d(dim, hidden, 1)
        self.act = act_layer()
        self.fc2 = nn.Conv2d(hidden, dim, 1)
        init_linear(self.fc1)
        init_linear(self.fc2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class MetaFormerBlock(nn.Module):
    """The two residual branches of a MetaFormer (Eqs. 2 and 3), with LayerScale (LS, one factor per channel)::

        y = x + drop_path(LS1 * token_mixer(norm1(x)))
        z = y + drop_path(LS2 * mlp(norm2(y)))

    Args:
        dim: number of channels C.
        token_mixer, norm_layer: called with ``dim``.
        act_layer: activation of the channel MLP, called without arguments.
        mlp_ratio: hidden channels of the MLP in units of ``dim``; ``None`` removes the second branch.
        residual: whether ``x +`` and ``y +`` are computed (Table 5 has a row without them).
        layer_scale_init: initial value of LayerScale; ``None`` removes it.
        drop_path: probability that a branch is dropped for a sample in training.

    Raises:
        InputError: in the forward pass, if the token mixer returns maps of another shape.
    """

    def __init__(
        self,
        dim: int,
        token_mixer: Layer = Pooling,
        norm_layer: Layer = MLN,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        mlp_ratio: float | None = 4,
        residual: bool = True,
        layer_scale_init: float | None = 1e-5,
        drop_path: float = 0.0,
    ):
        super().__init__()
        has_mlp, has_scale = mlp_ratio is not None, layer_scale_init is not None
        self.residual = residual
        self.recompute = False  # whether the backward pass computes activations again, see set_grad_checkpointing
        self.norm1 = norm_layer(dim)
        self.token_mixer = token_mixer(dim)
        self.layer_scale1 = nn.Parameter(layer_scale_init * torch.ones(dim)) if has_scale else None
        self.norm2 = norm_layer(dim) if has_mlp else None
        self.mlp = ChannelMlp(dim, act_layer, mlp_ratio) if has_mlp else None
        self.layer_scale2 = nn.Parameter(layer_scale_init * torch.ones(dim)) if has_mlp and has_scale else None
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.recompute and not torch.jit.is_scripting():
            return recomputed(self.plain, x, self)
        return self.plain(x)

    def plain(self, x: Tensor) -> Tensor:
        """The equations as printed."""
        x = self.add(x, self.token_mixer(self.norm1(x)), self.layer_scale1)
        if self.mlp is not None:
            x = self.add(x, self.mlp(self.norm2(x)), self.layer_scale2)
        return x

    def add(self, x: Tensor, branch: Tensor, layer_scale: Tensor | None) -> Tensor:
        check_shape(branch, x)
        if layer_scale is not None:
            branch = layer_scale[:, None, None] * branch
        branch = self.drop_path(branch)
        return x + branch if self.residual else branch


@torch.fx.wrap
def check_shape(branch: Tensor, x: Tensor) -> None:
    """Raise an ``InputError`` if a branch does not have the shape of its input: it might be broadcast in silence."""
    if not (torch.jit.is_scripting() or torch.jit.is_tracing()) and branch.shape != x.shape:
        shapes = f"{tuple(branch.shape)} for maps of {tuple(x.shape)}"
        raise InputError(f"a token mixer or channel MLP returned {shapes}: both have to keep the shape (B, C, H, W)")


def recomputed(function: Callable[[Tensor], Tensor], x: Tensor, module: nn.Module) -> Tensor:
    """``function(x)``, computed again in each backward pass through a kept graph.

    It is computed again with the parameters and buffers that ``module`` has now, even if ``function`` changes buffers
    or ``torch.func.functional_call`` has set them, and it then changes none. Parameters changed in place before a
    backward pass raise PyTorch's error.
    """
    if torch.compiler.is_compiling():  # a compiled backward pass repeats no update
        return checkpoint(function, x)
    parameters, passes = dict(module.named_parameters()), count()
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers() if not is_lazy(buffer)}

    def run(x: Tensor, *_: Tensor) -> Tensor:
        if next(passes) == 0:
            return function(x)
        copies = {name: buffers.get(name, buffer).clone() for name, buffer in module.named_buffers()}
        with _reparametrize_module(module, {**parameters, **copies}):
            return function(x)

    return checkpoint(run, x, *parameters.values())


def init_linear(layer: nn.Linear | nn.Conv2d) -> None:
    """The official initialisation of MLP and head; patch embeddings keep PyTorch's default."""
    trunc_normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)
