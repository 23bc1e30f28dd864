"""The registry: the five PoolFormers of Table 1 and the rows of the ablation (Table 5), registered with timm.

timm has classes with the names of the five. Importing this package replaces them in timm's registry, so that
``--model poolformer_s12`` always trains this package's model. ``timm.models.metaformer.poolformer_s12`` still builds
timm's own.
"""

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg
from torch import nn

from metaformer.block import ChannelLayerNorm
from metaformer.errors import check_known
from metaformer.mixers import Attention, DepthwiseConv, Pooling, RandomMixing, SpatialFC
from metaformer.model import MetaFormer, fixes_size
from metaformer.weights import adaptable, fetch

RELEASES = "https://github.com/sail-sg/poolformer/releases/download/v1.0"
S12 = {"depths": (2, 2, 6, 2), "dims": (64, 128, 320, 512), "layer_scale_init": 1e-5}
"""Arguments of :class:`MetaFormer` that make PoolFormer-S12, the baseline of Table 5."""


class Variant(NamedTuple):
    """A model of the registry. It is also a row of the ablation tables and studies if :attr:`row` is set."""

    label: str
    """Label in the tables: a model's name in Table 1, or the change in Table 5."""
    group: str
    """Heading of the row's group in the tables."""
    changes: dict[str, Any]
    """Arguments of :class:`MetaFormer` in which the variant differs from PoolFormer-S12."""
    row: str | None = None
    """Short name of the row in Table 5 of ``analysis/paper.yaml``, in studies, statements and figures."""
    crop_pct: float = 0.90
    """Fraction of the resized image that the evaluation crop keeps."""
    release: str | None = None
    """Name of the weights in the official release, if it has them."""
    global_batch: int | None = None
    """Batch size of the row's ImageNet recipe, if it is not the 4096 of the other rows (appendix A)."""

    @property
    def arguments(self) -> dict[str, Any]:
        """All arguments of :class:`MetaFormer` that make the variant."""
        return {**S12, **self.changes}


def by_row(*variants: Variant) -> dict[str, Variant]:
    return {f"metaformer_s12_{variant.row}": variant for variant in variants}


# Table 1. Half of the blocks are in the third stage, and a sixth in each of the others.
S24 = {"depths": (4, 4, 12, 4)}
S36 = {"depths": (6, 6, 18, 6), "layer_scale_init": 1e-6}
M36 = {**S36, "dims": (96, 192, 384, 768)}
M48 = {**M36, "depths": (8, 8, 24, 8)}
POOLFORMERS = {
    "poolformer_s12": Variant("PoolFormer-S12", "baseline", {}, "baseline", 0.90, "poolformer_s12"),
    "poolformer_s24": Variant("PoolFormer-S24", "PoolFormer", S24, None, 0.90, "poolformer_s24"),
    "poolformer_s36": Variant("PoolFormer-S36", "PoolFormer", S36, None, 0.90, "poolformer_s36"),
    "poolformer_m36": Variant("PoolFormer-M36", "PoolFormer", M36, None, 0.95, "poolformer_m36"),
    "poolformer_m48": Variant("PoolFormer-M48", "PoolFormer", M48, None, 0.95, "poolformer_m48"),
}

# Table 5. Every row keeps LayerScale because no row of the table is about it. Crops other than 0.90 are those of the
# released weights. Appendix A trains the rows with attention with layer norm and a batch of 1024.
POOL, FC, LN = Pooling, SpatialFC, ChannelLayerNorm
PPPA = {"token_mixers": (POOL, POOL, POOL, Attention), "norm_layers": LN, "pos_embeds": (False, False, False, True)}
PPAA = {**PPPA, "token_mixers": (POOL, POOL, Attention, Attention), "pos_embeds": (False, False, True, False)}
PPPF, PPFF = {"token_mixers": (POOL, POOL, POOL, FC)}, {"token_mixers": (POOL, POOL, FC, FC)}
MIXER, NORM, ACT, OTHER, HYBRID = "token mixer", "normalization", "activation", "other components", "hybrid stages"
ABLATIONS = by_row(
    Variant("pooling → identity", MIXER, {"token_mixers": nn.Identity}, "identity", 0.90, "metaformer_id_s12"),
    Variant("pooling → global random matrix", MIXER, {"token_mixers": RandomMixing}, "random"),
    Variant("pooling → depthwise convolution", MIXER, {"token_mixers": DepthwiseConv}, "dwconv"),
    Variant("pool size 3 → 5", MIXER, {"token_mixers": partial(Pooling, pool_size=5)}, "pool5"),
    Variant("pool size 3 → 7", MIXER, {"token_mixers": partial(Pooling, pool_size=7)}, "pool7"),
    Variant("pool size 3 → 9", MIXER, {"token_mixers": partial(Pooling, pool_size=9)}, "pool9"),
    Variant("MLN → layer norm over the channels", NORM, {"norm_layers": LN}, "ln"),
    Variant("MLN → batch norm", NORM, {"norm_layers": nn.BatchNorm2d}, "bn"),
    Variant("MLN → none", NORM, {"norm_layers": nn.Identity}, "nonorm"),
    Variant("GELU → ReLU", ACT, {"act_layer": nn.ReLU}, "relu"),
    Variant("GELU → SiLU", ACT, {"act_layer": nn.SiLU}, "silu"),
    Variant("residual connection → none", OTHER, {"residual": False}, "noresidual"),
    Variant("channel MLP → none", OTHER, {"mlp_ratio": None}, "nomlp"),
    Variant("[Pool, Pool, Pool, Attention]", HYBRID, PPPA, "pppa", 0.95, "metaformer_pppa_s12_224", 1024),
    Variant("[Pool, Pool, Attention, Attention]", HYBRID, PPAA, "ppaa", 0.95, "metaformer_ppaa_s12_224", 1024),
    Variant("[Pool, Pool, Pool, SpatialFC]", HYBRID, PPPF, "pppf", 0.90, "metaformer_pppf_s12_224"),
    Variant("[Pool, Pool, SpatialFC, SpatialFC]", HYBRID, PPFF, "ppff", 0.95, "metaformer_ppff_s12_224"),
)

# Questions about the baseline that the paper's table does not answer.
PATCHES = {"overlap": False}
BOTH = {**PATCHES, "token_mixers": nn.Identity}
QUESTIONS = by_row(
    Variant("LayerScale → none", OTHER, {"layer_scale_init": None}, "nolayerscale"),
    Variant("pool(x) - x → pool(x)", MIXER, {"token_mixers": partial(Pooling, subtract=False)}, "unsubtracted"),
    Variant("border not counted → counted", MIXER, {"token_mixers": partial(Pooling, count_border=True)}, "border"),
    Variant("norm, average → average, norm (timm)", "head", {"pool_before_norm": True}, "timmhead"),
    Variant("overlapping patch embeddings → kernel = stride", OTHER, PATCHES, "patches"),
    Variant("overlapping patch embeddings → kernel = stride, pooling → identity", OTHER, BOTH, "patchesidentity"),
)

VARIANTS = {**POOLFORMERS, **ABLATIONS, **QUESTIONS}

ROWS: dict[str, dict[str, Any]] = {
    **{variant.row: {"model": name} for name, variant in VARIANTS.items() if variant.row},
    "nodroppath": {"model": "poolformer_s12", "drop_path": 0.0},
}
"""All rows of the ablation, each with the settings of ``classification/train.py`` that make it."""
LABELS = {v.row: v.label for v in VARIANTS.values() if v.row} | {"nodroppath": "drop path → none"}
"""Labels of all rows of :data:`ROWS` in the tables."""


# The rest of the input is timm's default: 224 pixels, bicubic, ImageNet's mean and standard deviation.
default_cfgs = generate_default_cfgs(
    {
        f"{name}.sail_in1k" if variant.release else name: {
            "url": f"{RELEASES}/{variant.release}.pth.tar" if variant.release else "",
            "pool_size": (7, 7),
            "crop_pct": variant.crop_pct,
            "classifier": "head",
            "first_conv": "stem",
            "fixed_input_size": fixes_size(**variant.arguments),
        }
        for name, variant in VARIANTS.items()
    }
)


def variant_arguments(name: str) -> dict[str, Any]:
    """The arguments of :class:`MetaFormer` that make the variant ``name``; ``InputError`` if there is none."""
    check_known("variant", name, VARIANTS)
    return VARIANTS[name].arguments


def released_file(name: str, cache_dir: str | Path | None = None, **arguments: Any) -> Path | None:
    """The file with the released weights of a variant, fetched if necessary; ``None`` if its source is another.

    Raises:
        InputError: the file cannot be fetched, or is damaged.
    """
    source = (arguments.get(key) for key in ("pretrained_cfg", "pretrained_cfg_overlay"))
    settings = resolve_pretrained_cfg(name, *source)
    elsewhere = settings.file or settings.hf_hub_id or settings.state_dict
    return fetch(settings.url, cache_dir) if settings.url and not elsewhere else None


def entry_point(name: str) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, device: Any = None, dtype: Any = None, **kwargs) -> nn.Module:
        arguments = {**variant_arguments(name), **kwargs}
        if pretrained and (file := released_file(name, **kwargs)):
            overlay = kwargs.get("pretrained_cfg_overlay") or {}
            arguments["pretrained_cfg_overlay"] = {**overlay, "file": str(file)}
        levels = tuple(range(len(arguments["depths"])))
        return build_model_with_cfg(
            MetaFormer,
            name,
            pretrained,
            pretrained_filter_fn=adaptable,
            feature_cfg={"feature_cls": "getter", "flatten_sequential": True, "out_indices": levels},
            **arguments,
        ).to(device=device, dtype=dtype)

    create.__name__ = create.__qualname__ = name
    return create


with warnings.catch_warnings():
    # timm warns of the names that are replaced on purpose.
    warnings.filterwarnings("ignore", message="Overwriting", category=UserWarning)
    for _name in VARIANTS:
        register_model(entry_point(_name))
