"""Baselines of Table 2 that timm does not have by name, registered with it so that they can be counted."""

from functools import partial
from itertools import chain
from typing import Any

from timm.models import generate_default_cfgs, register_model
from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock, window_partition, window_reverse
from torch import Tensor, nn
from torch.nn import functional as F

PVT_LAYERS = {
    "pvt_tiny": (2, 2, 2, 2),
    "pvt_small": (3, 4, 6, 3),
    "pvt_medium": (3, 4, 18, 3),
    "pvt_large": (3, 8, 27, 3),
}
"""Blocks of each stage (arXiv 2102.12122, Table 1)."""
SWIN_MIXERS = {
    "swin_mixer_tiny_d24_256": (256, {"embed_dim": 96, "num_heads": (4, 8, 16, 32)}),
    "swin_mixer_tiny_d6_256": (256, {"embed_dim": 96, "num_heads": (16, 32, 64, 128)}),
    "swin_mixer_base_d24_224": (224, {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)}),
}
"""Side of the image and arguments, as in configs/swinmlp of github.com/microsoft/Swin-Transformer.

The side of a window is that of the last stage's map.
"""

default_cfgs = generate_default_cfgs(
    {name: {"input_size": (3, 224, 224), "fixed_input_size": True} for name in ("resmlp_big_24_16_224", *PVT_LAYERS)}
    | {name: {"input_size": (3, side, side), "fixed_input_size": True} for name, (side, _) in SWIN_MIXERS.items()}
)


@register_model
def resmlp_big_24_16_224(img_size: int = 224, num_classes: int = 1000, **_: Any) -> nn.Module:
    """ResMLP-B24 with patches of 16 pixels (arXiv 2105.03404, Table 3); timm's ``resmlp_big_24_224`` has 8."""
    block = partial(ResBlock, init_values=1e-6)
    arguments = {"patch_size": 16, "num_blocks": 24, "embed_dim": 768, "mlp_ratio": 4, "norm_layer": Affine}
    return MlpMixer(num_classes, img_size, block_layer=block, **arguments)


class PVT(nn.Module):
    """mmdet's Pyramid Vision Transformer, its last level averaged, and a classifier.

    The original classifies a token that it adds in the last stage: 512 parameters and 1/50 of that stage's MACs more.
    """

    def __init__(self, name: str, img_size: int = 224, num_classes: int = 1000, **_: Any):
        super().__init__()
        from mmdet.models import PyramidVisionTransformer  # here: nothing else of this file needs mmdet

        self.backbone = PyramidVisionTransformer(img_size, num_layers=list(PVT_LAYERS[name]))
        self.head = nn.Linear(512, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images)[-1].mean((-2, -1)))


def window_mlp(block: SwinTransformerBlock, x: Tensor) -> Tensor:
    """Mix the windows of maps (B, H, W, C) by ``block.attn``, a linear layer over the positions for each head.

    Shifted windows are padded with zeros at all sides of the image, where attention shifts it in a circle
    (arXiv 2103.14030, appendix A3.3).
    """
    _, height, width, channels = x.shape
    (side, _), (after, _), number = block.window_size, block.shift_size, block.attn.groups
    before = (side - after) % side
    x = F.pad(x, (0, 0, before, after, before, after))
    windows = window_partition(x, block.window_size).flatten(1, 2)  # (W, N, C)
    heads = windows.unflatten(-1, (number, -1))  # (W, N, h, C / h)
    mixed = block.attn(heads.transpose(1, 2).flatten(1, 2)).unflatten(1, (number, -1)).transpose(1, 2)
    x = window_reverse(mixed.reshape(-1, side, side, channels), block.window_size, *x.shape[1:3])
    return x[:, before : before + height, before : before + width]


def swin_mixer(name: str, img_size: int | None = None, num_classes: int = 1000, **_: Any) -> nn.Module:
    """Swin-Mixer, Swin with :func:`window_mlp` in place of attention (arXiv 2103.14030, Table 10)."""
    side, arguments = SWIN_MIXERS[name]
    model = SwinTransformer(img_size=img_size or side, num_classes=num_classes, window_size=side // 32, **arguments)
    for block in chain.from_iterable(stage.blocks for stage in model.layers):
        positions = block.attn.num_heads * block.window_area
        block.attn = nn.Conv1d(positions, positions, 1, groups=block.attn.num_heads)
        block._attn = partial(window_mlp, block)
    return model


for _name in (*SWIN_MIXERS, *PVT_LAYERS):
    _create = partial(swin_mixer if _name in SWIN_MIXERS else PVT, _name)
    _create.__name__, _create.__module__ = _name, __name__
    register_model(_create)
