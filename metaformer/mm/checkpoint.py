"""Read checkpoints of mmdet, mmseg and the official code without executing anything in them."""

from pathlib import Path
from typing import Any

from mmengine.dist import barrier, master_only

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
