"""Baselines of Table 2 that timm does not have by name, registered with it so that they can be counted."""

from functools import partial
from typing import Any

from timm.models import generate_default_cfgs, register_model
from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock
from torch import Tensor, nn

PVT_LAYERS = {
    "pvt_tiny": (2, 2, 2, 2),
    "pvt_small": (3, 4, 6, 3),
    "pvt_medium": (3, 4, 18, 3),
    "pvt_large": (3, 8, 27, 3),
}
"""Blocks of each stage (arXiv 2102.12122, Table 1)."""

default_cfgs = generate_default_cfgs(
    {name: {"input_size": (3, 224, 224), "fixed_input_size": True} for name in ("resmlp_big_24_16_224", *PVT_LAYERS)}
)


@register_model
def resmlp_big_24_16_224(img_size: int = 224, num_classes: int = 1000, **_: Any) -> nn.Module:
    """ResMLP-B24 with patches of 16 pixels (arXiv 2105.03404, Table 3); timm's ``resmlp_big_24_224`` has 8."""
    return MlpMixer(
        num_classes=num_classes,
        img_size=img_size,
        patch_size=16,
        num_blocks=24,
        embed_dim=768,
        mlp_ratio=4,
        block_layer=partial(ResBlock, init_values=1e-6),
        norm_layer=Affine,
    )


class PVT(nn.Module):
    """mmdet's Pyramid Vision Transformer, its last level averaged, and a classifier.

    The original classifies a token that it adds in the last stage: 512 parameters and 1/50 of that stage's MACs more.
    """

    def __init__(self, layers: tuple[int, ...], img_size: int, num_classes: int):
        super().__init__()
        from mmdet.models import PyramidVisionTransformer  # here: nothing else of this file needs mmdet

        self.backbone = PyramidVisionTransformer(img_size, num_layers=list(layers))
        self.head = nn.Linear(512, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images)[-1].mean((-2, -1)))


def pvt(name: str, img_size: int = 224, num_classes: int = 1000, **_: Any) -> nn.Module:
    return PVT(PVT_LAYERS[name], img_size, num_classes)


for _name in PVT_LAYERS:
    _create = partial(pvt, _name)
    _create.__name__, _create.__module__ = _name, __name__
    register_model(_create)
