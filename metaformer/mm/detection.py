"""For mmdet's configs: ``custom_imports = dict(imports=['metaformer.mm.detection'])``."""

import json
from pathlib import Path
from typing import Any

from mmdet.datasets import CocoDataset
from mmengine.registry import DATASETS

import metaformer.mm  # noqa: F401  (registers the backbone and the hooks)
from metaformer.errors import InputError
from metaformer.mm.data import NamesBadFiles, check_there

COCO_PAGE = "https://cocodataset.org/#download"


@DATASETS.register_module()
class CheckedCocoDataset(NamesBadFiles, CocoDataset):
    """mmdet's ``CocoDataset``; wrong data end before training starts, in a sentence.

    Raises:
        InputError: no annotation file, or a damaged one; classes that it does not have; pictures that are not there;
            none left to train on; boxes without masks where the pipeline loads masks.
    """

    def load_data_list(self) -> list[dict[str, Any]]:
        if not Path(self.ann_file).is_file():
            raise InputError(
                f"there is no annotation file {self.ann_file} (from {Path.cwd()}): get COCO 2017 from {COCO_PAGE} and "
                "unpack it as detection/README.md shows, or name yours with data_root and ann_file"
            )
        try:
            data = super().load_data_list()
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AssertionError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise InputError(f"{self.ann_file} is not an annotation file in COCO's format ({reason})") from error
        # mmdet gives the classes it finds the labels 0, 1, ..., so that one class too few shifts all after it.
        if len(self.cat_ids) != len(self.metainfo["classes"]):
            raise InputError(
                f"{self.ann_file} has {len(self.cat_ids)} of the {len(self.metainfo['classes'])} classes asked for: "
                "name those it has with metainfo=dict(classes=(...)) of the data set"
            )
        if not data:
            raise InputError(f"{self.ann_file} lists no picture")
        check_there((info["img_path"] for info in data), str(self.ann_file))
        if any(getattr(step, "with_mask", False) for step in self.pipeline.transforms):
            check_masks(data, str(self.ann_file))
        return data

    def filter_data(self) -> list[dict[str, Any]]:
        data = super().filter_data()
        if not data:
            raise InputError(f"{self.ann_file} has no picture with a box of the classes asked for")
        return data


def check_masks(data: list[dict[str, Any]], ann_file: str) -> None:
    without = [info["img_path"] for info in data if any("mask" not in instance for instance in info["instances"])]
    if without:
        raise InputError(
            f"{ann_file} has boxes without a mask ('segmentation') in {len(without)} of {len(data)} pictures, first in "
            f"{without[0]}: Mask R-CNN needs them, RetinaNet does not"
        )
