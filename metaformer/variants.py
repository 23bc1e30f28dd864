"""The five PoolFormers of Table 1, as data, registered with timm.

timm has classes under the same five names. Importing this package replaces them in timm's registry, so that
``--model poolformer_s12`` never trains another model in silence; ``timm.models.metaformer.poolformer_s12`` still builds
timm's own.
"""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from metaformer.errors import InputError, nearest
from metaformer.model import MetaFormer
from metaformer.weights import from_official

RELEASE = "https://github.com/sail-sg/poolformer/releases/download/v1.0"


class Variant(NamedTuple):
    depths: tuple[int, int, int, int]
    dims: tuple[int, int, int, int]
    layer_scale_init: float
    crop_pct: float
    """Share of the resized picture that the evaluation crop keeps."""


VARIANTS = {
    "poolformer_s12": Variant((2, 2, 6, 2), (64, 128, 320, 512), 1e-5, 0.90),
    "poolformer_s24": Variant((4, 4, 12, 4), (64, 128, 320, 512), 1e-5, 0.90),
    "poolformer_s36": Variant((6, 6, 18, 6), (64, 128, 320, 512), 1e-6, 0.90),
    "poolformer_m36": Variant((6, 6, 18, 6), (96, 192, 384, 768), 1e-6, 0.95),
    "poolformer_m48": Variant((8, 8, 24, 8), (96, 192, 384, 768), 1e-6, 0.95),
}

default_cfgs = generate_default_cfgs(
    {
        f"{name}.sail_in1k": {
            "url": f"{RELEASE}/{name}.pth.tar",
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
    variant = VARIANTS[name]
    return {"depths": variant.depths, "dims": variant.dims, "layer_scale_init": variant.layer_scale_init}


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
