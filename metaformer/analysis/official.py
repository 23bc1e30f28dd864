"""The official code (github.com/sail-sg/poolformer), imported from a clone as it is.

Its ``main`` and ``train_one_epoch`` run on the CPU. Stand-ins replace the names that timm has moved since, CUDA, files,
and the loader's processes.
"""

import importlib.util
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from operator import attrgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import numpy as np
import timm
import torch
from timm.data.loader import PrefetchLoader
from torch import Tensor, nn
from torch.utils.data import Dataset

from metaformer.errors import InputError
from metaformer.variants import VARIANTS

REPOSITORY = "https://github.com/sail-sg/poolformer"
MODELS = {name: variant.release for name, variant in VARIANTS.items() if variant.release}
"""The released architectures under our names and the official ones."""
DROP_PATH = {"poolformer_s36": "0.2", "poolformer_m36": "0.3", "poolformer_m48": "0.4"}
"""Drop path in the commands of the official README, where it is not 0.1."""


def load_official(clone: Path) -> ModuleType:
    """The module ``train.py`` of a clone; ``.models`` has its models.

    Raises:
        InputError: the folder is no clone of the official repository.
    """
    registry = ModuleType("registry")
    registry.register_model = lambda function: function  # timm's would put the official models in the place of ours
    stand_ins = {
        "timm.models": SimpleNamespace(**{**vars(timm.layers), **vars(timm.models)}),
        "timm.models.layers": timm.layers,
        "timm.models.layers.helpers": timm.layers.helpers,
        "timm.models.registry": registry,
        **dict.fromkeys(("mmseg", "mmdet", "apex", "wandb")),  # None: cannot be imported
    }
    try:
        with (
            patch.dict(sys.modules, stand_ins),
            patch.object(sys, "dont_write_bytecode", True),
            redirect_stdout(StringIO()),
        ):
            for name, file in (("models", "models/__init__.py"), ("train", "train.py")):
                spec = importlib.util.spec_from_file_location(name, clone / file)
                sys.modules[name] = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(sys.modules[name])
            train = sys.modules["train"]
        for name in ("main", "train_one_epoch", *(f"models.{name}" for name in MODELS.values())):
            attrgetter(name)(train)
    except Exception as error:
        raise InputError(f"{clone} is no clone of {REPOSITORY} that can be imported: {error}") from error
    return train


def official_model(train: ModuleType, name: str, **options: Any) -> nn.Module:
    model = getattr(train.models, name)(**{key: value for key, value in options.items() if value is not None})
    model.pretrained_cfg = model.default_cfg  # the name under which today's timm looks for it
    return model


def run_main(train: ModuleType, arguments: list[str], epoch: Callable, validate: Callable) -> None:
    """Run the official ``main`` with ``epoch`` and ``validate`` in place of its ``train_one_epoch`` and ``validate``.

    In place of loaders, these get the arguments of ``create_loader``.
    """
    with (
        TemporaryDirectory() as folder,
        patch.multiple(
            train,
            create_model=lambda name, **options: official_model(train, name, **options),
            create_loader=lambda _, **options: options,
            train_one_epoch=epoch,
            validate=validate,
            get_outdir=lambda *_: folder,
            CheckpointSaver=MagicMock(**{"return_value.save_checkpoint.return_value": (0, 0)}),
            **dict.fromkeys(("setup_default_logging", "create_dataset", "update_summary"), MagicMock()),
        ),
        patch.object(sys, "argv", ["train.py", "data", *arguments]),
        patch.object(nn.Module, "cuda", lambda module: module),
        patch("torch.cuda.synchronize"),
        patch.dict("os.environ", WORLD_SIZE="1"),
    ):
        train.main()


def readme_arguments(name: str) -> list[str]:
    """Arguments with which the official README trains a model, without apex."""
    return ["--model", MODELS[name], "-b", "128", "--lr", "1e-3", "--drop-path", DROP_PATH.get(name, "0.1")]


def official_setup(train: ModuleType, name: str) -> SimpleNamespace:
    """The model, optimizer, learning rates by epoch, loss, and arguments of both loaders that ``main`` makes."""
    found = SimpleNamespace(rates=[])

    def epoch(_: int, model: nn.Module, loader: dict, optimizer: Any, loss: nn.Module, *__: Any, **___: Any) -> None:
        found.model, found.train, found.optimizer, found.loss = model, loader, optimizer, loss
        found.rates.append([group["lr"] for group in optimizer.param_groups])

    def validate(_: nn.Module, loader: dict, *__: Any, **___: Any) -> dict[str, float]:
        found.eval = loader
        return {"top1": 0.0}

    run_main(train, readme_arguments(name), epoch, validate)
    return found


def official_loader(pictures: Dataset, options: dict[str, Any]) -> PrefetchLoader:
    """timm's loader as ``main`` asks for it, in this process; gives ``pictures`` its transform."""
    return timm.data.create_loader(pictures, **{**options, "num_workers": 0, "device": torch.device("cpu")})


def official_batch(loader: PrefetchLoader, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mix, normalise and erase uint8 pictures as the loader does."""
    with patch("timm.data.mixup.rand_bbox", pinned_box):
        mixed = loader.loader.collate_fn(list(zip(images.numpy(), labels.tolist(), strict=True)))
    with patch.object(loader, "loader", [mixed]):
        return next(iter(loader))


def pinned_box(shape: tuple[int, ...], lam: float, margin: float = 0.0, count: int | None = None) -> tuple:
    """CutMix's box by the rule of the timm that the official README names: an odd side loses a pixel."""
    sides = []
    for size in shape[-2:]:
        half, middle = int(size * np.sqrt(1 - lam)) // 2, np.random.randint(0, size, size=count)
        sides += [np.clip(middle - half, 0, size), np.clip(middle + half, 0, size)]
    return tuple(sides)
