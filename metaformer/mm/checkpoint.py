"""Checkpoints of mmdet, mmseg and the official code: read them safely and rename their tensors."""

import re
from pathlib import Path
from typing import Any

from mmengine.dist import barrier, master_only
from torch import nn

from metaformer.formats import StateDict, to_ours
from metaformer.weights import fetch, read_checkpoint


def load_from_path_or_url(source: str, map_location: Any = None) -> dict:
    """Read a checkpoint from a path, or an http(s) address, which is downloaded once. Nothing in it is executed.

    The tensors are on the CPU whatever ``map_location`` says, since loading them into a model copies them.

    Raises:
        InputError: the file is missing, damaged, or holds more than tensors and plain data.
    """
    path = Path(source).expanduser()
    if source.startswith(("http://", "https://")):
        master_only(fetch)(source)
        barrier()
        path = fetch(source)  # downloads it again only on machines that do not share the cache
    checkpoint = read_checkpoint(path)
    if isinstance(checkpoint.get("meta"), dict):
        # Old versions store the config here, and mmengine would execute it to learn the number of GPUs.
        checkpoint["meta"].pop("config", None)
    return checkpoint


def from_official_pyramid(weights: StateDict) -> StateDict:
    """Rename the tensors of a backbone in any known format; ``norm{0,2,4,6}`` are the levels of the official code."""
    return {
        re.sub(r"^norm([0246])\.", lambda match: f"out_norms.{int(match[1]) // 2}.", name): tensor
        for name, tensor in to_ours(weights).items()
    }


def rename_official(module: nn.Module, state_dict: StateDict, prefix: str, *_: Any) -> None:
    """Rename the tensors of a backbone under ``prefix`` in ``state_dict``, in place."""
    theirs = {name.removeprefix(prefix): state_dict.pop(name) for name in list(state_dict) if name.startswith(prefix)}
    state_dict.update({prefix + name: tensor for name, tensor in from_official_pyramid(theirs).items()})
