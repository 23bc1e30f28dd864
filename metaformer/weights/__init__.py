"""Weights in and out: read a checkpoint safely, open it as a model, or load it into one, whole or not at all."""

from metaformer.weights.files import HF_FILES, fetch, read_checkpoint
from metaformer.weights.loading import differences, listed, load_state, load_weights, named_for, weights_of
from metaformer.weights.opener import Opened, open_checkpoint

__all__ = [
    "HF_FILES",
    "Opened",
    "differences",
    "fetch",
    "listed",
    "load_state",
    "load_weights",
    "named_for",
    "open_checkpoint",
    "read_checkpoint",
    "weights_of",
]
