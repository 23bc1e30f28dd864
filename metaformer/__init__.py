"""PoolFormer and MetaFormer (arXiv 2111.11418). Importing this registers the models with timm."""

from metaformer.block import MLN, ChannelLayerNorm, ChannelMlp, MetaFormerBlock
from metaformer.errors import InputError
from metaformer.folding import fuse
from metaformer.formats import convert
from metaformer.mixers import Attention, DepthwiseConv, Pooling, RandomMixing, SpatialFC
from metaformer.model import MetaFormer
from metaformer.variants import ABLATIONS, POOLFORMERS, QUESTIONS, VARIANTS
from metaformer.weights import load_weights

__all__ = [
    "ABLATIONS",
    "MLN",
    "POOLFORMERS",
    "QUESTIONS",
    "VARIANTS",
    "Attention",
    "ChannelLayerNorm",
    "ChannelMlp",
    "DepthwiseConv",
    "InputError",
    "MetaFormer",
    "MetaFormerBlock",
    "Pooling",
    "RandomMixing",
    "SpatialFC",
    "convert",
    "fuse",
    "load_weights",
]
