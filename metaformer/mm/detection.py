"""Registers the backbone, the hooks and data sets for mmdet: ``custom_imports = dict(imports=[...])`` names it."""

import json
from pathlib import Path
from typing import Any

from mmdet.datasets import CocoDataset
from mmdet.datasets.api_wrappers import COCO
from mmengine.registry import DATASETS

from metaformer.errors import InputError
from metaformer.mm import backbone, hooks  # noqa: F401  (registers them)
from metaformer.mm.data import CheckedDataset, check_there, first_sample

COCO_PAGE = "https://cocodataset.org/#download"


class CheckedCoco(COCO):
    """An annotation file whose categories must be the classes asked for, in the same order.

    mmdet numbers the classes it finds 0, 1, ... in the order of the file, whatever the order of ``classes``. It leaves
    out a box of an unknown category and a picture whose id occurs again, and cannot evaluate a box without ``iscrowd``.
    """

    def __init__(self, annotation_file: str):
        super().__init__(annotation_file)
        self.path = annotation_file
        if len(self.imgs) < len(self.dataset["images"]):
            raise InputError(f"{self.path} has two pictures with the same id")
        for box in self.anns.values():
            if box["category_id"] not in self.cats or "iscrowd" not in box:
                says = "a category_id that is not listed, or no iscrowd (0 for a single object)"
                raise InputError(f"annotation {box['id']} of {self.path} has {says}")

    def get_cat_ids(self, cat_names: tuple[str, ...]) -> list[int]:
        ids, asked = super().get_cat_ids(cat_names), list(cat_names)
        found = [category["name"] for category in self.load_cats(ids)]
        if sorted(found) != sorted(asked):
            raise InputError(
                f"{self.path} has {len(found)} of the {len(asked)} classes asked for: name each of its classes once "
                "with metainfo=dict(classes=(...)) of the data set"
            )
        if found != asked:
            raise InputError(
                f"{self.path} lists the classes in another order than metainfo, and mmdet numbers them in the order of "
                f"the file: use metainfo=dict(classes=({', '.join(map(repr, found))})) in all data sets"
            )
        return ids


@DATASETS.register_module()
class CheckedCocoDataset(CheckedDataset, CocoDataset):
    """mmdet's ``CocoDataset``, which refuses bad data before training starts.

    Raises:
        InputError: the annotation file is missing, damaged, or has other classes; a picture is missing; no picture has
            a box; boxes have no masks although the pipeline loads masks. While samples are made: a picture has another
            size than its annotation says.
    """

    COCOAPI = CheckedCoco

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
        if not data:
            raise InputError(f"{self.ann_file} lists no picture")
        check_there((info["img_path"] for info in data), str(self.ann_file))
        if any(getattr(step, "with_mask", False) for step in self.pipeline.transforms):
            without = [info["img_path"] for info in data if any("mask" not in box for box in info["instances"])]
            if without:
                raise InputError(
                    f"{self.ann_file} has boxes without a mask ('segmentation') in {len(without)} of {len(data)} "
                    f"pictures, first in {without[0]}: Mask R-CNN needs them, RetinaNet does not"
                )
        return data

    def filter_data(self) -> list[dict[str, Any]]:
        data = super().filter_data()
        if not data:
            raise InputError(f"{self.ann_file} has no picture with a box of the classes asked for")
        return data

    def prepare_data(self, idx: int) -> dict[str, Any] | None:
        data = super().prepare_data(idx)
        info = self.get_data_info(idx)
        height, width = info["height"], info["width"]
        if data is not None and first_sample(data).metainfo.get("ori_shape", (height, width)) != (height, width):
            is_height, is_width = first_sample(data).ori_shape
            raise InputError(
                f"{info['img_path']} has {is_width} x {is_height} pixels, but {self.ann_file} says {width} x {height}: "
                "its boxes would be in the wrong place"
            )
        return data
