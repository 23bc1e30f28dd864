"""Draw the predictions of a detector or segmentor into pictures. The commands are in detection/ and segmentation/."""

import argparse
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mmcv
import numpy as np
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DATASETS, MODELS, VISUALIZERS, init_default_scope
from torch import nn

from metaformer.errors import InputError
from metaformer.mm.backbone import weights_for
from metaformer.mm.checkpoint import check_weights, load_from_path_or_url


def load_model(config: str, checkpoint: str, device: str) -> nn.Module:
    """Build the model of ``config`` with all the weights of ``checkpoint``, in evaluation mode.

    Its ``dataset_meta`` has the class names of the checkpoint, or those of the config if the checkpoint has none.

    Raises:
        InputError: a file does not exist, or the checkpoint holds another model.
    """
    if not Path(config).is_file():
        raise InputError(f"there is no config {config}")
    settings = Config.fromfile(config)
    settings.model.backbone.init_cfg = None
    init_default_scope(settings.default_scope)
    model = revert_sync_batchnorm(MODELS.build(settings.model))
    loaded = load_from_path_or_url(checkpoint)
    weights = weights_for(model, loaded)
    check_weights(model, weights, checkpoint)
    model.load_state_dict(weights)
    model.dataset_meta = {
        **DATASETS.build({**settings.test_dataloader.dataset, "lazy_init": True}).metainfo,
        **loaded.get("meta", {}).get("dataset_meta", {}),
    }
    settings.test_pipeline = settings.test_dataloader.dataset.pipeline  # where mmseg looks for it
    model.cfg = settings
    return model.to(device).eval()


def draw(model: nn.Module, pictures: list[str], folder: Path, infer: Callable, **options: Any) -> None:
    """Write each picture with its predictions to ``folder/NAME.png`` and print that path.

    Args:
        infer: maps the model and the path of a picture to a data sample.
        options: arguments of the visualizer's ``add_datasample``.

    Raises:
        InputError: a picture cannot be read.
    """
    visualizer = VISUALIZERS.build({**model.cfg.visualizer, "vis_backends": None})
    visualizer.dataset_meta = model.dataset_meta
    for picture in pictures:
        image = mmcv.imread(picture)
        if image is None:
            raise InputError(f"{picture} is not a picture")
        path = target(picture, folder)
        sample = infer(model, picture)
        rgb = np.ascontiguousarray(image[..., ::-1])
        visualizer.add_datasample(picture, rgb, sample, draw_gt=False, out_file=str(path), **options)
        print(path)


def target(picture: str, folder: Path) -> Path:
    return folder / f"{Path(picture).stem}.png"


def predict(description: str, infer: Callable, **options: Any) -> None:
    """The command ``predict.py CONFIG CHECKPOINT PICTURE...``; see :func:`draw` for the arguments."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("config", help="config that the model was trained with, or its copy work_dirs/NAME/NAME.py")
    parser.add_argument("checkpoint", help="path or http(s) address of a checkpoint of this config")
    parser.add_argument("pictures", nargs="+", metavar="picture", help="path of a picture, in any format OpenCV reads")
    parser.add_argument(
        "--out", type=Path, default=Path("predictions"), help="folder to write to (default: %(default)s)"
    )
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="device to compute on: cpu, cuda or cuda:N (default: cuda if there is a GPU, else cpu)",
    )
    arguments = parser.parse_args()
    targets = Counter(target(picture, arguments.out) for picture in arguments.pictures)
    for picture in arguments.pictures:
        if not Path(picture).is_file():
            raise InputError(f"there is no picture {picture}")
        path = target(picture, arguments.out)
        if targets[path] > 1 or path.resolve() == Path(picture).resolve():
            raise InputError(f"{path}, the drawing of {picture}, would overwrite another picture: use another --out")
    model = load_model(arguments.config, arguments.checkpoint, arguments.device)
    draw(model, arguments.pictures, arguments.out, infer, **options)
