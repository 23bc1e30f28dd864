"""PoolFormer and MetaFormer (arXiv 2111.11418). Importing this registers the models with timm."""

from metaformer.errors import InputError
from metaformer.mixers import Pooling
from metaformer.model import MLN, ChannelMlp, MetaFormer, MetaFormerBlock
from metaformer.variants import VARIANTS
from metaformer.weights import load_weights

__all__ = [
    "MLN",
    "VARIANTS",
    "ChannelMlp",
    "InputError",
    "MetaFormer",
    "MetaFormerBlock",
    "Pooling",
    "load_weights",
]
