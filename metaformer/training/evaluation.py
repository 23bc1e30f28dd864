"""Top-1, top-5 and cross-entropy of a model over a validation loader."""

import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from metaformer.errors import InputError
from metaformer.training.batches import Unreadable, checked
from metaformer.training.distributed import Processes


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: DataLoader,
    normalise: Callable[[Tensor], Tensor],
    cast: AbstractContextManager,
    processes: Processes,
    progress: Callable[[Iterable], Iterable] = iter,
    skip: Callable[[list[Unreadable]], None] | None = None,
) -> dict[str, float]:
    """top1 and top5 in percent, mean cross-entropy ``loss``, ``images`` and ``images_per_s``, over all processes.

    ``skip`` as in :func:`data.checked`; the pictures left out count nowhere.

    Raises:
        InputError: a picture or label that :func:`data.checked` refuses, or no picture that can be read.
    """
    model.eval()
    start = time.perf_counter()
    totals = torch.zeros(4, dtype=torch.float64, device=processes.device)  # loss, top-1, top-5, images
    for images, labels in progress(checked(iter(loader), model.num_classes, skip)):
        if not len(labels):  # all of the batch was skipped
            continue
        labels = labels.to(processes.device, non_blocking=True)
        with cast:
            logits = model(normalise(images))
        logits = logits.float()
        top5 = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        totals += torch.stack([loss, top5[:, 0].sum(), top5.sum(), torch.tensor(len(labels), device=loss.device)])
    loss, top1, top5, images = processes.sum(totals).tolist()
    if not images:
        raise InputError("no picture of the validation split can be read")
    seconds = time.perf_counter() - start
    return {
        "top1": 100 * top1 / images,
        "top5": 100 * top5 / images,
        "loss": loss / images,
        "images": int(images),
        "images_per_s": images / seconds,
    }
