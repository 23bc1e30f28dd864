"""Entry points of torch.hub: the five PoolFormers by name, and ``metaformer`` for any model of the registry.

``torch.hub.load(REPOSITORY, "poolformer_s12", pretrained=True)`` and
``torch.hub.load(REPOSITORY, "metaformer", "metaformer_s12_ppaa", num_classes=10)`` take the arguments of
``timm.create_model``.
"""

from functools import partial as _partial

import timm as _timm
from torch import nn as _nn

from metaformer import variants as _variants

dependencies = ["numpy", "safetensors", "timm", "torch"]


def metaformer(name: str, pretrained: bool = False, **arguments) -> _nn.Module:
    """A PoolFormer or a row of the ablation by its name. An unknown name raises an error that lists all of them."""
    _variants.variant_arguments(name)  # raises the error
    return _timm.create_model(name, pretrained, **arguments)


globals().update({name: _partial(metaformer, name) for name in _variants.POOLFORMERS})
