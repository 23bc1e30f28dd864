"""PoolFormer and MetaFormer (arXiv 2111.11418). Importing this registers the models with timm."""

from metaformer.block import MLN, ChannelLayerNorm, ChannelMlp, MetaFormerBlock
from metaformer.errors import InputError
from metaformer.folding import fuse
from metaformer.formats import convert
from metaformer.mixers import Attention, DepthwiseConv, Pooling, RandomMixing, SpatialFC
from metaformer.model import MetaFormer
from metaformer.variants import ABLATIONS, POOLFORMERS, QUESTIONS, VARIANTS
from metaformer.version import __version__
from metaformer.weights import Opened, load_weights, open_checkpoint
