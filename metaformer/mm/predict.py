"""Draw what a trained detector or segmentor finds in pictures; the commands are in detection/ and segmentation/."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mmcv
import numpy as np
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DATASETS, MODELS, VISUALIZERS, init_default_scope
from mmengine.runner import CheckpointLoader
from torch import nn

from metaformer.errors import InputError
from metaformer.mm.checkpoint import check_weights, weights_for


def load_model(config: str, checkpoint: str, device: str) -> nn.Module:
    """The model of ``config`` with all the weights of ``checkpoint``, in evaluation mode.

    Raises:
        InputError: no such file, or a checkpoint of another model.
    """
    if not Path(config).is_file():
        raise InputError(f"there is no config {config}")
    settings = Config.fromfile(config)
    settings.model.backbone.init_cfg = None
    init_default_scope(settings.default_scope)
    model = revert_sync_batchnorm(MODELS.build(settings.model))
    loaded = CheckpointLoader.load_checkpoint(checkpoint, map_location="cpu")
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


def predict(infer: Callable[[nn.Module, str], Any], drawing: dict[str, Any]) -> None:
    """The command: ``CONFIG CHECKPOINT PICTURE...``.

    Args:
        infer: the toolbox's function from a model and a picture's path to a data sample.
        drawing: arguments for the toolbox's visualizer.
    """
    parser = argparse.ArgumentParser(prog=f"python {sys.argv[0]}")
    parser.add_argument("config", help="the config, or what training copied it to: work_dirs/NAME/NAME.py")
    parser.add_argument("checkpoint")
    parser.add_argument("pictures", nargs="+", metavar="picture")
    parser.add_argument("--out", type=Path, default=Path("predictions"), help="folder (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    missing = [picture for picture in arguments.pictures if not Path(picture).is_file()]
    if missing:
        raise InputError(f"there is no picture {missing[0]}")
    model = load_model(arguments.config, arguments.checkpoint, arguments.device)
    visualizer = VISUALIZERS.build({**model.cfg.visualizer, "vis_backends": None})
    visualizer.dataset_meta = model.dataset_meta
    for picture in arguments.pictures:
        image = mmcv.imread(picture)
        if image is None:
            raise InputError(f"{picture} is not a picture")
        path = arguments.out / f"{Path(picture).stem}.png"
        sample = infer(model, picture)
        rgb = np.ascontiguousarray(image[..., ::-1])
        visualizer.add_datasample(picture, rgb, sample, draw_gt=False, out_file=str(path), **drawing)
        print(path)
