"""MetaFormer (arXiv 2111.11418): one backbone, the token mixer left open.

Shapes: B images, C channels, H x W positions; every feature map is (B, C, H, W).
"""

import inspect
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from typing import Any

import torch
import torch.fx
from timm.layers import to_2tuple
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from metaformer.block import MLN, Layer, MetaFormerBlock, init_linear
from metaformer.errors import InputError
from metaformer.fused import FusedBlock
from metaformer.mixers import Pooling, PositionEmbedding, Size


class MetaFormer(nn.Module):
    """The backbone of Table 1 with a classification head: stem, stages, then norm, global average, linear.

    A stage is a downsampling convolution (none in the first one), a position embedding (optional), then the blocks.

    Images may have any size from 32 x 32 pixels upwards, unless a token mixer or a position embedding fixes the number
    of tokens; then images must have ``img_size``.

    Args:
        depths, dims: blocks and channels of each stage.
        token_mixers: called with the number of channels C, returns a module from (B, C, H, W) to the same shape; one
            for all stages or one for each. A mixer whose constructor requires a parameter ``map_size`` also gets (H, W)
            of its stage's maps under that name.
        norm_layers: called with C; one for all stages or one for each. The last one also makes the head's norm.
        act_layer, mlp_ratio, residual, layer_scale_init: see :class:`MetaFormerBlock`.
        drop_path_rate: drop path of the last block; grows linearly from 0 in the first (Table 6).
        drop_rate: dropout before the classifier.
        in_chans: channels of the input image.
        img_size: side, or height and width, of the images in pixels. Only mixers with a ``map_size`` and position
            embeddings depend on it.
        pos_embeds: whether a learned position embedding precedes the blocks; for all stages or for each.
        num_classes: outputs of the classifier; with 0 there is none, and the model returns (B, C) features.
        stem_stride: 4 as in the paper, or 2 or 1 for small images.
        overlap: patch embeddings with kernels of 7 (stem) and 3 pixels, as in the paper; otherwise the kernels are as
            large as their strides, so that no convolution mixes tokens.
        pool_before_norm: average before the head's norm, as timm's class does; the paper's code averages after it.
        global_pool: ``"avg"``, or ``""`` to omit the average, so that the head keeps (B, C, H, W).
        fused: build :class:`FusedBlock`, which computes the same function in fewer passes over memory, in place of the
            printed equations.

    Raises:
        InputError: a per-stage argument of the wrong length, a module or a name in place of a class, an unknown
            ``global_pool`` or ``stem_stride``, an argument out of its range.
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
        overlap: bool = True,
        pool_before_norm: bool = False,
        global_pool: str = "avg",
        fused: bool = True,
    ):
        super().__init__()
        if stem_stride not in (1, 2, 4):
            raise InputError(f"stem_stride is {stem_stride!r}: use 4, as the paper, or 2 or 1 for small images")
        if not 0 <= drop_path_rate <= 1:
            raise InputError(f"drop_path_rate is {drop_path_rate}: give a probability from 0 to 1")
        size = to_2tuple(img_size)
        if len(size) != 2 or min(size) < 1:
            raise InputError(f"img_size is {img_size}: give the side of the images in pixels, or their (height, width)")
        stages = len(depths)
        dims = per_stage("dims", dims, stages)
        token_mixers = per_stage("token_mixers", token_mixers, stages)
        norm_layers = per_stage("norm_layers", norm_layers, stages)
        pos_embeds = per_stage("pos_embeds", pos_embeds, stages)
        for layer in (*token_mixers, *norm_layers, act_layer):
            if isinstance(layer, nn.Module) or not callable(layer):
                raise InputError(f"{layer!r} does not make a layer: give a class, or a function that returns a module")
        block, last = count(), max(sum(depths) - 1, 1)

        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = dims[-1]
        self.feature_info = [
            {"num_chs": dim, "reduction": stem_stride * 2**i, "module": f"stages.{i}"} for i, dim in enumerate(dims)
        ]
        self.pool_before_norm = pool_before_norm
        self.fixed_size = fixes_size(token_mixers, pos_embeds)  # whether images must have img_size
        self._traits = {"fixed_input_size": self.fixed_size}  # for timm

        self.stem = patch_embedding(in_chans, dims[0], 7 if overlap else stem_stride, stem_stride)
        self.stages = nn.Sequential()
        for i, dim in enumerate(dims):
            downsample = nn.Identity() if i == 0 else patch_embedding(dims[i - 1], dim, 3 if overlap else 2, stride=2)
            size = size_after(self.stem if i == 0 else downsample, size)
            mixer = token_mixers[i]
            make_block = partial(
                FusedBlock if fused else MetaFormerBlock,
                dim,
                token_mixer=partial(mixer, map_size=size) if takes_map_size(mixer) else mixer,
                norm_layer=norm_layers[i],
                act_layer=act_layer,
                mlp_ratio=mlp_ratio,
                residual=residual,
                layer_scale_init=layer_scale_init,
            )
            blocks = [make_block(drop_path=drop_path_rate * next(block) / last) for _ in range(depths[i])]
            position = PositionEmbedding(dim, size) if pos_embeds[i] else nn.Identity()
            parts = {"downsample": downsample, "position": position, "blocks": nn.Sequential(*blocks)}
            self.stages.append(nn.Sequential(OrderedDict(parts)))
        self.norm = norm_layers[-1](dims[-1])
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)

    def group_matcher(self, coarse: bool = False) -> dict:
        """Layers for timm's layer-wise learning-rate decay: stem, stages (``coarse``) or blocks, head with its norm."""
        by_block = [(r"^stages\.(\d+)\.(?:downsample|position)", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else by_block}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass instead of keeping them.

        A block keeps one map of C channels and repeats its forward pass. A fused block keeps two and repeats one matrix
        product. A block of another class has to follow its attribute ``recompute`` itself.
        """
        for stage in self.stages:
            for block in stage.blocks:
                block.recompute = enable

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new classifier of ``num_classes`` outputs (0: none) in place, on the device of the model."""
        pool = self.global_pool if global_pool is None else global_pool
        if pool not in ("avg", ""):
            raise InputError(f"global_pool is {pool!r}: use 'avg', or '' to keep the feature map")
        if num_classes > 0 and pool == "":
            raise InputError("global_pool='' leaves no vector to classify: use num_classes=0 with it, or 'avg'")
        self.num_classes, self.global_pool = num_classes, pool
        if num_classes > 0:
            like = next(self.parameters())
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
            intermediates_only: return the list alone, without the last stage's output.
        """
        if output_fmt != "NCHW":
            raise InputError(f"output_fmt is {output_fmt!r}: MetaFormer's feature maps come as 'NCHW' only")
        take, last = feature_take_indices(len(self.stages), indices)
        check_images(x, self.in_chans)
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
        """Remove the layers that :meth:`forward_intermediates` does not need for ``indices``; return those indices."""
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
        check_images(x, self.in_chans)
        return self.stages(self.stem(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The output of :meth:`forward_features` to logits (B, num_classes), or to their input with ``pre_logits``."""
        if self.global_pool == "":
            x = self.norm(x)
        elif self.pool_before_norm:
            x = self.norm(x.mean((-2, -1), keepdim=True)).flatten(1)
        else:
            x = self.norm(x).mean((-2, -1))
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


@torch.fx.wrap
def check_images(x: Tensor, channels: int) -> None:
    """Raise an ``InputError`` if ``x`` is not a batch of images with this number of channels."""
    if not torch.jit.is_scripting() and (x.ndim != 4 or x.shape[1] != channels):
        raise InputError(f"images have shape {tuple(x.shape)}: expected (batch, {channels}, height, width)")


def patch_embedding(in_chans: int, dim: int, kernel_size: int, stride: int) -> nn.Conv2d:
    """A convolution that divides multiples of its stride exactly; the paper's has kernel 7 and stride 4, or 3 and 2."""
    return nn.Conv2d(in_chans, dim, kernel_size, stride, padding=(kernel_size - stride + 1) // 2)


def size_after(conv: nn.Conv2d, size: Size) -> Size:
    """Height and width of the output of ``conv`` for maps of ``size``."""
    sides = zip(size, conv.kernel_size, conv.stride, conv.padding, strict=True)
    return tuple((side + 2 * padding - kernel) // stride + 1 for side, kernel, stride, padding in sides)


def takes_map_size(token_mixer: Layer) -> bool:
    """Whether the constructor of a token mixer requires the size (H, W) of its maps."""
    parameter = inspect.signature(token_mixer).parameters.get("map_size")
    return parameter is not None and parameter.default is parameter.empty


def fixes_size(token_mixers: Any = Pooling, pos_embeds: Any = False, **_: Any) -> bool:
    """Whether a model with these arguments takes images of one size only."""
    return any(as_list(pos_embeds)) or any(map(takes_map_size, as_list(token_mixers)))


def per_stage(name: str, value: Any, stages: int) -> list[Any]:
    """One value for each stage, from such a sequence or from a single value for all."""
    values = as_list(value)
    if len(values) not in (1, stages):
        raise InputError(f"{name} has {len(values)} entries: give one, or one for each of the {stages} stages")
    return values * (stages // len(values))


def as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
