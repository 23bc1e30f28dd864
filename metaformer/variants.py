"""The five PoolFormers of Table 1 and the ablations of Table 5, as data, registered with timm.

timm has classes under the names of the five. Importing this package replaces them in timm's registry, so that
``--model poolformer_s12`` never trains another model in silence; ``timm.models.metaformer.poolformer_s12`` still builds
timm's own.
"""

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg
from torch import nn

from metaformer.errors import InputError, nearest
from metaformer.mixers import Attention, DepthwiseConv, Pooling, RandomMixing, SpatialFC
from metaformer.model import ChannelLayerNorm, MetaFormer
from metaformer.weights import fetch, named_for

RELEASE = "https://github.com/sail-sg/poolformer/releases/download/v1.0"


class Variant(NamedTuple):
    arguments: dict[str, Any]
    """Of :class:`MetaFormer`."""
    crop_pct: float = 0.90
    """Share of the resized picture that the evaluation crop keeps."""
    release: str | None = None
    """Name of the weights in the official release, if there are any."""


SMALL, MEDIUM = (64, 128, 320, 512), (96, 192, 384, 768)


def poolformer(name: str, depth: int, dims: tuple[int, ...], layer_scale_init: float, crop_pct: float) -> Variant:
    """A row of Table 1: of the blocks, half are in the third stage and a sixth in each other."""
    depths = (depth // 6, depth // 6, depth // 2, depth // 6)
    return Variant({"depths": depths, "dims": dims, "layer_scale_init": layer_scale_init}, crop_pct, name)


POOLFORMERS = {
    name: poolformer(name, *row)
    for name, row in {
        "poolformer_s12": (12, SMALL, 1e-5, 0.90),
        "poolformer_s24": (24, SMALL, 1e-5, 0.90),
        "poolformer_s36": (36, SMALL, 1e-6, 0.90),
        "poolformer_m36": (36, MEDIUM, 1e-6, 0.95),
        "poolformer_m48": (48, MEDIUM, 1e-6, 0.95),
    }.items()
}
S12 = POOLFORMERS["poolformer_s12"].arguments

# What each row of Table 5 changes in its baseline, poolformer_s12. LayerScale stays in all of them, since no row of the
# table is about it. The crops that are not 0.90 are those of the released weights.
CHANGES = {
    "identity": Variant({"token_mixers": nn.Identity}, release="metaformer_id_s12"),
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
        release="metaformer_pppa_s12_224",
    ),
    "ppaa": Variant(
        {
            "token_mixers": (Pooling, Pooling, Attention, Attention),
            "pos_embeds": (False, False, True, False),
            "norm_layers": ChannelLayerNorm,
        },
        crop_pct=0.95,
        release="metaformer_ppaa_s12_224",
    ),
    "pppf": Variant({"token_mixers": (Pooling, Pooling, Pooling, SpatialFC)}, release="metaformer_pppf_s12_224"),
    "ppff": Variant({"token_mixers": (Pooling, Pooling, SpatialFC, SpatialFC)}, 0.95, "metaformer_ppff_s12_224"),
}
ABLATIONS = {
    f"metaformer_s12_{row}": change._replace(arguments={**S12, **change.arguments}) for row, change in CHANGES.items()
}

# What users ask about the baseline and the table does not answer.
QUESTIONS = {
    f"metaformer_s12_{name}": Variant({**S12, **change})
    for name, change in {
        "nolayerscale": {"layer_scale_init": None},
        "unsubtracted": {"token_mixers": partial(Pooling, subtract=False)},
        "border": {"token_mixers": partial(Pooling, count_border=True)},
        "timmhead": {"pool_before_norm": True},
    }.items()
}

VARIANTS = {**POOLFORMERS, **ABLATIONS, **QUESTIONS}

default_cfgs = generate_default_cfgs(
    {
        f"{name}.sail_in1k" if variant.release else name: {
            "url": f"{RELEASE}/{variant.release}.pth.tar" if variant.release else "",
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


def released_file(
    name: str, pretrained_cfg: Any = None, pretrained_cfg_overlay: dict | None = None, **_: Any
) -> Path | None:
    """The file with the released weights of a variant, fetched if need be; ``None`` if it has none, or another source.

    Raises:
        InputError: it cannot be fetched, or came damaged.
    """
    settings = resolve_pretrained_cfg(name, pretrained_cfg, pretrained_cfg_overlay)
    return fetch(settings.url) if settings.url and not settings.file else None


def entry_point(name: str) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, **kwargs) -> nn.Module:
        arguments = {**variant_arguments(name), **kwargs}
        if pretrained and (file := released_file(name, **kwargs)):
            overlay = kwargs.get("pretrained_cfg_overlay") or {}
            arguments["pretrained_cfg_overlay"] = {**overlay, "file": str(file)}
        return build_model_with_cfg(
            MetaFormer,
            name,
            pretrained,
            pretrained_filter_fn=named_for,
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
