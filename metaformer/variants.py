"""The five PoolFormers of Table 1 and the ablations of Table 5, as data, registered with timm.

timm has classes under the names of the five. Importing this package replaces them in timm's registry, so that
``--model poolformer_s12`` never trains another model in silence; ``timm.models.metaformer.poolformer_s12`` still builds
timm's own.
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from metaformer.errors import InputError, nearest
from metaformer.mixers import Attention, DepthwiseConv, Pooling, RandomMixing, SpatialFC
from metaformer.model import ChannelLayerNorm, MetaFormer
from metaformer.weights import from_official

RELEASE = "https://github.com/sail-sg/poolformer/releases/download/v1.0"


class Variant(NamedTuple):
    arguments: dict[str, Any]
    """Of :class:`MetaFormer`."""
    crop_pct: float = 0.90
    """Share of the resized picture that the evaluation crop keeps."""


SMALL, MEDIUM = (64, 128, 320, 512), (96, 192, 384, 768)
S12 = {"depths": (2, 2, 6, 2), "dims": SMALL, "layer_scale_init": 1e-5}

POOLFORMERS = {
    "poolformer_s12": Variant(S12),
    "poolformer_s24": Variant({"depths": (4, 4, 12, 4), "dims": SMALL, "layer_scale_init": 1e-5}),
    "poolformer_s36": Variant({"depths": (6, 6, 18, 6), "dims": SMALL, "layer_scale_init": 1e-6}),
    "poolformer_m36": Variant({"depths": (6, 6, 18, 6), "dims": MEDIUM, "layer_scale_init": 1e-6}, crop_pct=0.95),
    "poolformer_m48": Variant({"depths": (8, 8, 24, 8), "dims": MEDIUM, "layer_scale_init": 1e-6}, crop_pct=0.95),
}

# What each row of Table 5 changes in its baseline, poolformer_s12. LayerScale stays in all of them, since no row of the
# table is about it. The crops that are not 0.90 are those of the released weights.
CHANGES = {
    "identity": Variant({"token_mixers": nn.Identity}),
    "random": Variant({"token_mixers": RandomMixing}),
    "dwconv": Variant({"token_mixers": DepthwiseConv}),
    "pool5": Variant({"token_mixers": partial(Pooling, pool_size=5)}),
    "pool7": Variant({"token_mixers": partial(Pooling, pool_size=7)}),
    "pool9": Variant({"token_mixers": partial(Pooling, pool_size=9)}),
    "ln": Variant({"norm_layers": ChannelLayerNorm}),
    "bn": Variant({"norm_layers": nn.BatchNorm2d}),
    "nonorm": Variant({"norm_layers": nn.Identity}),
    "relu": Variant({"act_layer": nn.ReLU}),
    "silu": Variant({"act_layer": nn.SiLU}),
    "noresidual": Variant({"residual": False}),
    "nomlp": Variant({"mlp_ratio": None}),
    "pppa": Variant(
        {
            "token_mixers": (Pooling, Pooling, Pooling, Attention),
            "pos_embeds": (False, False, False, True),
            "norm_layers": ChannelLayerNorm,
        },
        crop_pct=0.95,
    ),
    "ppaa": Variant(
        {
            "token_mixers": (Pooling, Pooling, Attention, Attention),
            "pos_embeds": (False, False, True, False),
            "norm_layers": ChannelLayerNorm,
        },
        crop_pct=0.95,
    ),
    "pppf": Variant({"token_mixers": (Pooling, Pooling, Pooling, SpatialFC)}),
    "ppff": Variant({"token_mixers": (Pooling, Pooling, SpatialFC, SpatialFC)}, crop_pct=0.95),
}
ABLATIONS = {
    f"metaformer_s12_{row}": Variant({**S12, **change.arguments}, change.crop_pct) for row, change in CHANGES.items()
}

VARIANTS = {**POOLFORMERS, **ABLATIONS}

default_cfgs = generate_default_cfgs(
    {
        f"{name}.sail_in1k" if name in POOLFORMERS else name: {
            "url": f"{RELEASE}/{name}.pth.tar" if name in POOLFORMERS else "",
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "pool_size": (7, 7),
            "crop_pct": variant.crop_pct,
            "interpolation": "bicubic",
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "classifier": "head",
            "first_conv": "stem",
        }
        for name, variant in VARIANTS.items()
    }
)


def variant_arguments(name: str) -> dict[str, Any]:
    """The arguments of :class:`MetaFormer` that make the variant ``name``; ``InputError`` if there is none."""
    if name not in VARIANTS:
        raise InputError(f"there is no variant {name!r}{nearest(name, VARIANTS)}: there are {', '.join(VARIANTS)}")
    return dict(VARIANTS[name].arguments)


def entry_point(name: str) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, **kwargs) -> nn.Module:
        arguments = {**variant_arguments(name), **kwargs}
        return build_model_with_cfg(
            MetaFormer,
            name,
            pretrained,
            pretrained_filter_fn=from_official,
            feature_cfg={"feature_cls": "getter", "out_indices": tuple(range(len(arguments["depths"])))},
            **arguments,
        )

    create.__name__ = create.__qualname__ = name
    return create


with warnings.catch_warnings():
    # timm warns of names registered twice; here that is the point.
    warnings.filterwarnings("ignore", message="Overwriting", category=UserWarning)
    for _name in VARIANTS:
        register_model(entry_point(_name))
