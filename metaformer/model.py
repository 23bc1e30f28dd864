"""MetaFormer (arXiv 2111.11418): one backbone, the token mixer left open.

Shapes: B images, C channels, H x W positions; every feature map is (B, C, H, W).
"""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch
from timm.layers import DropPath, LayerNorm2d, calculate_drop_path_rates, to_2tuple, trunc_normal_
from timm.models import checkpoint
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from metaformer.errors import InputError
from metaformer.fused import mlp_half, pooling_half
from metaformer.mixers import Pooling, Size, check_size

T = TypeVar("T")
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
    """Two 1x1 convolutions with an activation between them (section 3.1, Eq. 3): (B, C, H, W) to the same."""

    def __init__(self, dim: int, act_layer: Callable[[], nn.Module] = nn.GELU, ratio: float = 4):
        super().__init__()
        self.fc1 = nn.Conv2d(dim, int(dim * ratio), 1)
        self.act = act_layer()
        self.fc2 = nn.Conv2d(int(dim * ratio), dim, 1)
        init_linear(self.fc1)
        init_linear(self.fc2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class MetaFormerBlock(nn.Module):
    """``x + LS1 * drop_path(mixer(norm1(x)))``, then ``x + LS2 * drop_path(mlp(norm2(x)))`` (Eqs. 2 and 3).

    LS1 and LS2 are LayerScale, one factor per channel (section 4.1).

    Args:
        dim: number of channels C.
        token_mixer, norm_layer: called with ``dim``.
        act_layer: activation of the channel MLP, called without arguments.
        mlp_ratio: hidden channels of the MLP in units of ``dim``; ``None`` leaves out the whole second half.
        residual: whether ``x +`` is there (Table 5 has a row without).
        layer_scale_init: initial value of LayerScale; ``None`` leaves it out.
        drop_path: probability that a branch is dropped for a sample while training.
        fused: compute the halves that :attr:`fusable` names as in :mod:`metaformer.fused`: the same function in fewer
            passes over memory.
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
        fused: bool = True,
    ):
        super().__init__()
        has_mlp = mlp_ratio is not None

        def layer_scale() -> nn.Parameter | None:
            return None if layer_scale_init is None else nn.Parameter(torch.full((dim,), layer_scale_init))

        self.residual = residual
        self.norm1 = norm_layer(dim)
        self.token_mixer = token_mixer(dim)
        self.layer_scale1 = layer_scale()
        self.norm2 = norm_layer(dim) if has_mlp else None
        self.mlp = ChannelMlp(dim, act_layer, mlp_ratio) if has_mlp else None
        self.layer_scale2 = layer_scale() if has_mlp else None
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.fused = fused
        self.grad_checkpointing = False

    @property
    def fusable(self) -> tuple[bool, bool]:
        """Which halves :mod:`metaformer.fused` computes: pooling after MLN, then an MLP with GELU after MLN.

        The second not without the first, as it would change the layout of the maps on the way. A module whose forward
        would be missed stays in charge: one of another class, or with hooks, as those that count operations have.
        """
        if not self.residual or _has_any_global_hook():
            return False, False
        mixer, mlp = self.token_mixer, self.mlp
        first = as_made(self.norm1, MLN) and as_made(mixer, Pooling) and as_made(mixer.pool, nn.AvgPool2d)
        first = first and mixer.subtract and not mixer.pool.count_include_pad
        second = first and as_made(self.norm2, MLN) and as_made(mlp, ChannelMlp) and as_made(mlp.act, nn.GELU)
        second = second and all(as_made(fc, nn.Conv2d) and fc.kernel_size == (1, 1) for fc in (mlp.fc1, mlp.fc2))
        return first, second and mlp.act.approximate == "none"

    def forward(self, x: Tensor) -> Tensor:
        # What is exported consists of the operators that runtimes know.
        first, second = self.fusable if self.fused and not torch.compiler.is_exporting() else (False, False)
        if self.grad_checkpointing and not (first and second):
            return checkpoint(self._forward, x, first, second)
        return self._forward(x, first, second)

    def _forward(self, x: Tensor, first: bool, second: bool) -> Tensor:
        if first:
            norm, pool_size = self.norm1, self.token_mixer.pool.kernel_size
            x = pooling_half(x, norm.weight, norm.bias, self.layer_scale1, self._keep(x), pool_size, norm.eps)
        else:
            x = self._add(x, self.token_mixer(self.norm1(x)), self.layer_scale1)
        if second:
            norm, fc1, fc2 = self.norm2, self.mlp.fc1, self.mlp.fc2
            weights = (norm.weight, norm.bias, fc1.weight, fc1.bias, fc2.weight, fc2.bias, self.layer_scale2)
            x = mlp_half(x, *weights, self._keep(x), norm.eps, recompute=self.grad_checkpointing)
        elif self.mlp is not None:
            x = self._add(x, self.mlp(self.norm2(x)), self.layer_scale2)
        return x

    def _keep(self, x: Tensor) -> Tensor | None:
        """Drop path's factor for each sample, drawn as the plain form draws it."""
        if isinstance(self.drop_path, nn.Identity) or not self.drop_path.training:
            return None
        return self.drop_path(x.new_ones(x.shape[0], 1, 1, 1))

    def _add(self, x: Tensor, branch: Tensor, layer_scale: Tensor | None) -> Tensor:
        if layer_scale is not None:
            branch = layer_scale[:, None, None] * branch
        branch = self.drop_path(branch)
        return x + branch if self.residual else branch


class PositionEmbedding(nn.Module):
    """A learned vector per position, zero at the start, added to the maps (section 4.4): (B, C, H, W) to the same.

    Raises:
        InputError: maps of another size (H, W) than ``size``.
    """

    def __init__(self, dim: int, size: Size):
        super().__init__()
        self.size = tuple(size)
        self.pos_embed = nn.Parameter(torch.zeros(1, dim, *size))

    def forward(self, x: Tensor) -> Tensor:
        check_size(self, x)
        return x + self.pos_embed


class MetaFormerStage(nn.Module):
    """A downsampling convolution (none in the first stage) and the blocks that work at its resolution."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module], position: nn.Module | None = None):
        super().__init__()
        self.downsample = downsample
        self.position = nn.Identity() if position is None else position
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.position(self.downsample(x)))


class MetaFormer(nn.Module):
    """The backbone of Table 1 with a classification head: stem, stages, then norm, global average, linear.

    The head normalises before it averages, as the paper's code does; timm's class of the same name averages first, as
    ``pool_before_norm`` does.
    Anything from 32 pixels a side upwards goes in, multiples of 32 or not, unless a token mixer or a position embedding
    fixes the number of tokens; then images are of ``img_size``.

    Args:
        depths, dims: blocks and channels of each stage.
        token_mixers: called with the number of channels C, maps (B, C, H, W) to the same shape; one for all stages or
            one for each. One that has a parameter ``size`` gets (H, W) of its stage's maps as well.
        norm_layers: called with C; one for all stages or one for each. The last also makes the norm of the head.
        act_layer, mlp_ratio, residual, layer_scale_init: see :class:`MetaFormerBlock`.
        drop_path_rate: drop path of the last block; grows linearly from 0 in the first (Table 6).
        drop_rate: dropout before the classifier.
        in_chans: channels of the input image.
        img_size: side, or height and width, of the images in pixels; nothing depends on it but mixers that fix the
            number of tokens and position embeddings.
        pos_embeds: whether a learned position embedding comes before the blocks; for all stages or for each.
        num_classes: outputs of the classifier; 0 leaves it out, and the model returns (B, C) features.
        stem_stride: of the stem, 4 in the paper; 2 or 1 for pictures that are small to begin with.
        pool_before_norm: whether the head averages first.
        global_pool: ``"avg"``, or ``""`` to leave out the average, so that the head keeps (B, C, H, W).
        fused: see :class:`MetaFormerBlock`; ``False`` computes the equations as they are printed.

    Raises:
        InputError: a per-stage argument of the wrong length, an unknown ``global_pool`` or ``stem_stride``.
    """

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 6, 2),
        dims: Sequence[int] = (64, 128, 320, 512),
        token_mixers: Layer | Sequence[Layer] = Pooling,
        norm_layers: Layer | Sequence[Layer] = MLN,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        mlp_ratio: float | None = 4,
        residual: bool = True,
        layer_scale_init: float | None = 1e-5,
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        in_chans: int = 3,
        img_size: int | Size = 224,
        pos_embeds: bool | Sequence[bool] = False,
        num_classes: int = 1000,
        stem_stride: int = 4,
        pool_before_norm: bool = False,
        global_pool: str = "avg",
        fused: bool = True,
    ):
        super().__init__()
        if stem_stride not in (1, 2, 4):
            raise InputError(f"stem_stride is {stem_stride!r}: use 4, as the paper, or 2 or 1 for small pictures")
        stages = len(depths)
        dims = per_stage("dims", dims, stages)
        token_mixers = per_stage("token_mixers", token_mixers, stages)
        norm_layers = per_stage("norm_layers", norm_layers, stages)
        pos_embeds = per_stage("pos_embeds", pos_embeds, stages)
        drop_path_rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)

        self.grad_checkpointing = False
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = dims[-1]
        self.feature_info = [
            {"num_chs": dim, "reduction": stem_stride * 2**i, "module": f"stages.{i}"} for i, dim in enumerate(dims)
        ]
        self.pool_before_norm = pool_before_norm

        # 2 in the paper, and as much as a multiple of the stride needs to be divided by it
        padding = (8 - stem_stride) // 2
        self.stem = nn.Conv2d(in_chans, dims[0], kernel_size=7, stride=stem_stride, padding=padding)
        self.stages = nn.Sequential()
        size = size_after(self.stem, to_2tuple(img_size))
        for i, dim in enumerate(dims):
            downsample = nn.Identity() if i == 0 else nn.Conv2d(dims[i - 1], dim, kernel_size=3, stride=2, padding=1)
            size = size if i == 0 else size_after(downsample, size)
            token_mixer = for_size(token_mixers[i], size)
            blocks = [
                MetaFormerBlock(
                    dim,
                    token_mixer=token_mixer,
                    norm_layer=norm_layers[i],
                    act_layer=act_layer,
                    mlp_ratio=mlp_ratio,
                    residual=residual,
                    layer_scale_init=layer_scale_init,
                    drop_path=rate,
                    fused=fused,
                )
                for rate in drop_path_rates[i]
            ]
            position = PositionEmbedding(dim, size) if pos_embeds[i] else None
            self.stages.append(MetaFormerStage(downsample, blocks, position))
        self.norm = norm_layers[-1](dims[-1])
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)

    def group_matcher(self, coarse: bool = False) -> dict:
        """Layers for timm's layer-wise learning-rate decay: stem, stages (``coarse``) or blocks, head with its norm."""
        by_block = [(r"^stages\.(\d+)\.(?:downsample|position)", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else by_block}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass instead of keeping them: a block's, or a fused block's MLP's.

        A fused block keeps two maps of its C channels and repeats one matrix product; a plain one keeps one and repeats
        all of its forward pass.
        """
        self.grad_checkpointing = enable
        for stage in self.stages:
            for block in stage.blocks:
                block.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new classifier of ``num_classes`` outputs (0: none) in place, on the device of the model."""
        if global_pool is not None:
            if global_pool not in ("avg", ""):
                raise InputError(f"global_pool is {global_pool!r}: use 'avg', or '' to keep the feature map")
            self.global_pool = global_pool
        self.num_classes = num_classes
        if num_classes > 0:
            like = self.stem.weight
            self.head = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
            init_linear(self.head)
        else:
            self.head = nn.Identity()

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Outputs of the stages, at strides 4, 8, 16 and 32 with the paper's stem.

        Args:
            x: images, (B, in_chans, H, W).
            indices: the last n stages (int), these stages (sequence), or all (``None``).
            norm: apply the norm of the head to the last stage's output in the list.
            stop_early: do not compute stages after the last one asked for.
            output_fmt: only ``"NCHW"``.
            intermediates_only: return the list alone, without what :meth:`forward_features` would return.
        """
        if output_fmt != "NCHW":
            raise InputError(f"output_fmt is {output_fmt!r}: MetaFormer's feature maps come as 'NCHW' only")
        take, last = feature_take_indices(len(self.stages), indices)
        self._check_images(x)
        x = self.stem(x)
        intermediates = []
        for i, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x = stage(x)
            if i in take:
                intermediates.append(self.norm(x) if norm and i == len(self.stages) - 1 else x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what :meth:`forward_intermediates` does not need for ``indices``; returns them counted from 0."""
        take, last = feature_take_indices(len(self.stages), indices)
        shortened = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        if shortened:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_norm or shortened:
            self.norm = nn.Identity()
        if prune_head or shortened:
            self.reset_classifier(0, "")
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to the last stage's output, before the norm of the head."""
        self._check_images(x)
        return self.stages(self.stem(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """What :meth:`forward_features` returns to logits (B, num_classes), or with ``pre_logits`` to what they see."""
        if self.global_pool and self.pool_before_norm:
            x = self.norm(x.mean((-2, -1), keepdim=True)).flatten(1)
        elif self.global_pool:
            x = self.norm(x).mean((-2, -1))
        else:
            x = self.norm(x)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def _check_images(self, x: Tensor) -> None:
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise InputError(f"images have shape {tuple(x.shape)}: expected (batch, {self.in_chans}, height, width)")


def as_made(module: nn.Module | None, kind: type[nn.Module]) -> bool:
    """Whether ``module`` computes what its class ``kind`` says, and nobody watches it do so."""
    watched = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if type(module) is not kind or "forward" in vars(module):
        return False
    return not any(getattr(module, hooks) for hooks in watched)


def init_linear(layer: nn.Linear | nn.Conv2d) -> None:
    """The official initialisation of MLP and head; patch embeddings keep PyTorch's default."""
    trunc_normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)


def size_after(conv: nn.Conv2d, size: Size) -> Size:
    """Height and width of what ``conv`` makes of maps of ``size``."""
    sides = zip(size, conv.kernel_size, conv.stride, conv.padding, strict=True)
    return tuple((side + 2 * padding - kernel) // stride + 1 for side, kernel, stride, padding in sides)


def for_size(token_mixer: Layer, size: Size) -> Layer:
    """The token mixer with ``size`` filled in, if it asks for it."""
    return partial(token_mixer, size=size) if "size" in inspect.signature(token_mixer).parameters else token_mixer


def per_stage(name: str, value: T | Sequence[T], stages: int) -> list[T]:
    values = list(value) if isinstance(value, Sequence) else [value] * stages
    if len(values) != stages:
        raise InputError(f"{name} has {len(values)} entries: give one, or one for each of the {stages} stages")
    return values
