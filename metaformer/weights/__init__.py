"""Read checkpoints safely, open them as models, and load them into models."""

from metaformer.weights.files import fetch, read_checkpoint
from metaformer.weights.loading import adaptable, load_state, load_weights, weights_of
from metaformer.weights.opener import Opened, open_checkpoint
