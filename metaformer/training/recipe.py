"""Build the parts of a recipe from its settings: batch, optimizer, schedule, Mixup, CutMix and random erasing."""

import math

import numpy as np
import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn

from metaformer.errors import InputError
from metaformer.training.config import Config


def split_batch(global_batch: int, device_batch: int, world: int, even: bool) -> tuple[int, int]:
    """Images in a pass of one device, and passes of each device in an optimizer step: as few as device_batch allows.

    Raises:
        InputError: The processes cannot share the global batch equally, or not in even passes where Mixup needs them.
    """
    share, left = divmod(global_batch, world)
    if left or not share:
        raise InputError(
            f"global_batch={global_batch} cannot be shared equally by {world} processes: "
            f"use a multiple, such as {max(1, share) * world}"
        )
    for passes in range(math.ceil(share / device_batch), share + 1):
        if share % passes == 0 and not (even and share // passes % 2):
            return share // passes, passes
    raise InputError(
        f"each process takes {share} of the {global_batch} images in a step, in passes of {device_batch} or less, and "
        f"Mixup and CutMix need even numbers: use global_batch={(share + share % 2) * world} and device_batch=2 or "
        "more, or mixup=0 cutmix=0"
    )


def build_optimizer(config: Config, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    given = {"eps": config.opt_eps, "betas": config.opt_betas, "layer_decay": config.layer_decay}
    options = {name: value for name, value in given.items() if value is not None}
    if "kron" in config.opt:  # its random numbers would differ between the devices, and then their weights
        options["deterministic"] = True
    try:
        optimizer = create_optimizer_v2(model, opt=config.opt, lr=lr, weight_decay=config.weight_decay, **options)
    except Exception as error:  # some need CUDA, a package, or other betas; each says so in its own way
        raise InputError(f"cannot make opt={config.opt} with opt_betas={config.opt_betas}: {error}") from error
    if getattr(optimizer, "is_second_order", False):
        raise InputError(f"opt={config.opt} needs second derivatives, which the training loop does not compute")
    return optimizer


def build_scheduler(config: Config, optimizer: torch.optim.Optimizer, steps: int) -> tuple[Scheduler, int]:
    """The schedule of the learning rate, and the number of epochs with those of the cooldown.

    Args:
        steps: optimizer steps in an epoch.

    Raises:
        InputError: the schedule would end or begin above its largest learning rate.
    """
    lr = optimizer.defaults["lr"]
    used = {"min_lr": config.sched == "cosine", "warmup_lr": config.warmup_epochs > 0}
    for name in (name for name, is_used in used.items() if is_used and getattr(config, name) > lr):
        raise InputError(
            f"{name}={getattr(config, name):g} is above the learning rate {lr:g}: give a smaller {name}=, or a larger "
            "lr=, or a larger base_lr=, which counts for 1024 images of global_batch"
        )
    return create_scheduler(config, optimizer, updates_per_epoch=steps)  # the settings have the names of timm's


class Mixing(Mixup):
    """Mixup and CutMix of uint8 images (B, 3, H, W), as the official script's loader mixes them.

    It mixes before normalisation and rounds the pixels, as timm's ``FastCollateMixup`` does. Its CutMix boxes have even
    sides: the timm of the official README (commit 9d6aad4, as 0.4.12 and 0.5.4) halves a side twice, and rounds down.
    """

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Returns mixed images, float32 with whole numbers, and smoothed targets (B, num_classes)."""
        self.size = images.shape[-1]
        images, targets = super().__call__(images.to(torch.float32, copy=True), labels)
        return images.round_(), targets

    def _params_per_batch(self) -> tuple[float, bool]:
        lam, cutmix = super()._params_per_batch()
        return (float(self._with_even_side(lam)) if cutmix else lam), cutmix

    def _params_per_elem(self, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        lam, cutmix = super()._params_per_elem(batch_size)
        return np.where(cutmix, self._with_even_side(lam), lam).astype(np.float32), cutmix

    def _with_even_side(self, lam: float | np.ndarray) -> np.ndarray:
        """The share of a picture that a CutMix box leaves, such that timm cuts the next smaller box with even sides."""
        side = np.floor(self.size * np.sqrt(1 - np.asarray(lam, dtype=np.float64))) // 2 * 2
        return 1 - ((side + 0.5) / self.size) ** 2  # timm truncates the added half pixel, which absorbs rounding errors


def build_mixing(config: Config, num_classes: int) -> Mixing | None:
    """Maps uint8 images (B, 3, H, W) and labels (B,) to mixed images and smoothed targets (B, num_classes).

    ``None`` if neither Mixup nor CutMix is on.
    """
    if not (config.mixup or config.cutmix):
        return None
    alphas = {"mixup_alpha": config.mixup, "cutmix_alpha": config.cutmix}
    draws = {"prob": config.mixup_prob, "switch_prob": config.mixup_switch_prob, "mode": config.mixup_mode}
    return Mixing(**alphas, **draws, label_smoothing=config.smoothing, num_classes=num_classes)


def build_erasing(config: Config, device: torch.device) -> RandomErasing:
    return RandomErasing(config.erase_prob, mode=config.erase_mode, max_count=config.erase_count, device=str(device))
