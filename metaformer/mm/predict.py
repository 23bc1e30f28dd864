"""Draw the predictions of a detector or segmentor into pictures. The commands are in detection/ and segmentation/."""

import argparse
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import mmcv
import torch
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DATASETS, VISUALIZERS
from torch import nn

from metaformer.errors import InputError
from metaformer.mm.backbone import checked_weights
from metaformer.mm.checkpoint import load_from_path_or_url
from metaformer.mm.config import build_model, read_config
from metaformer.provenance import writing


def load_model(config: str, checkpoint: str, device: str, toolboxes: Collection[str] = ("mmdet", "mmseg")) -> nn.Module:
    """Build the model of ``config`` with all the weights of ``checkpoint``, in evaluation mode.

    Its ``dataset_meta`` has the class names of the checkpoint, or those of the config if the checkpoint has none.

    Raises:
        InputError: a file does not exist, the config is not one for tests of the model of a toolbox, or the checkpoint
            holds another model.
    """
    settings = read_config(config, toolboxes)
    if missing := [part for part in ("test_dataloader", "visualizer") if not settings.get(part)]:
        raise InputError(f"{config} has no {' and no '.join(missing)}: use the config that the model was trained with")
    model = revert_sync_batchnorm(build_model(settings))
    loaded = load_from_path_or_url(checkpoint)
    weights, _ = checked_weights(model, loaded, checkpoint)
    model.load_state_dict(weights)
    model.dataset_meta = {
        **DATASETS.build({**settings.test_dataloader.dataset, "lazy_init": True}).metainfo,
        **loaded.get("meta", {}).get("dataset_meta", {}),
    }
    if len(model.dataset_meta.get("palette") or ()) < len(model.dataset_meta["classes"]):
        model.dataset_meta.pop("palette", None)  # COCO's 80 colours for other classes; mmdet then chooses some
    settings.test_pipeline = settings.test_dataloader.dataset.pipeline  # where mmseg looks for it
    model.cfg = settings
    return model.to(device).eval()


def predict(description: str, infer: Callable, toolbox: str, **drawing: Any) -> None:
    """The command ``predict.py CONFIG CHECKPOINT PICTURE...``: writes ``NAME.png`` for each picture, and prints that.

    Args:
        infer: the toolbox's function from a model and the path of a picture to a data sample.
        toolbox: the ``default_scope`` of its configs.
        drawing: arguments of the visualizer's ``add_datasample``.
    """
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    devices = ["cuda", *gpus, "cpu"] if gpus else ["cpu"]
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("config", help="config that the model was trained with, or its copy work_dirs/NAME/NAME.py")
    parser.add_argument("checkpoint", help="path or http(s) address of a checkpoint of this config")
    parser.add_argument("pictures", nargs="+", metavar="picture", help="path of a picture in any format of OpenCV")
    parser.add_argument("--out", default="predictions", help="folder to write to (default: %(default)s)")
    parser.add_argument("--device", choices=devices, default=devices[0], help="(default: %(default)s)")
    arguments = parser.parse_args()
    targets = {picture: Path(arguments.out, f"{Path(picture).stem}.png") for picture in arguments.pictures}
    for picture, path in targets.items():
        if not Path(picture).is_file():
            raise InputError(f"there is no picture {picture}")
        if list(targets.values()).count(path) > 1 or path.resolve() == Path(picture).resolve():
            raise InputError(f"{path}, the drawing of {picture}, would overwrite another picture: use another --out")
    model = load_model(arguments.config, arguments.checkpoint, arguments.device, [toolbox])
    visualizer = VISUALIZERS.build({**model.cfg.visualizer, "vis_backends": None})
    visualizer.dataset_meta = model.dataset_meta
    for picture, path in targets.items():
        image = mmcv.imread(picture)
        if image is None:
            raise InputError(f"{picture} is not a picture")
        found = infer(model, picture)
        with writing(path):
            visualizer.add_datasample(picture, mmcv.bgr2rgb(image), found, draw_gt=False, out_file=str(path), **drawing)
        print(path)
