"""Registers the backbone, the hooks and data sets for mmdet: ``custom_imports = dict(imports=[...])`` names it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from mmdet.datasets import CocoDataset
from mmdet.datasets.api_wrappers import COCO
from mmengine.registry import DATASETS

from metaformer.errors import InputError
from metaformer.mm import backbone, hooks  # noqa: F401  (registers them)
from metaformer.mm.data import CheckedDataset, check_masks, check_size, check_there

COCO_PAGE = "https://cocodataset.org/#download"


class CheckedCoco(COCO):
    """An annotation file whose categories must be the classes asked for, in the same order.

    mmdet numbers the classes it finds 0, 1, ... in the order of the file, whatever the order of ``classes``. It leaves
    out a box of an unknown category and a picture whose id occurs again, and cannot evaluate a box without ``iscrowd``.
    pycocotools writes the id of the object that was found, and 0 for none.
    """

    def __init__(self, annotation_file: str):
        super().__init__(annotation_file)
        self.path = annotation_file
        if len(self.imgs) < len(self.dataset["images"]):
            raise InputError(f"{self.path} has two pictures with the same id")
        for box in self.anns.values():
            if box["category_id"] not in self.cats or "iscrowd" not in box or box["id"] == 0 or len(box["bbox"]) != 4:
                needs = "a listed category_id, an iscrowd (0 for a single object), a bbox of 4 numbers, an id above 0"
                raise InputError(f"annotation {box['id']} of {self.path} needs {needs}")

    def get_cat_ids(self, cat_names: tuple[str, ...]) -> list[int]:
        ids = super().get_cat_ids(cat_names)
        if [category["name"] for category in self.load_cats(ids)] != list(cat_names):
            names = tuple(category["name"] for category in self.dataset["categories"])
            raise InputError(
                f"{self.path} has other classes than the {len(cat_names)} of metainfo, or in another order, by which "
                f"mmdet would number them: use metainfo=dict(classes={names}) in all data sets"
            )
        return ids


@DATASETS.register_module()
class CheckedCocoDataset(CheckedDataset, CocoDataset):
    """mmdet's ``CocoDataset``, which refuses bad data before training starts.

    Raises:
        InputError: the annotation file is missing, damaged, or has other classes; boxes are given by their corners; a
            picture is missing; no picture has a box; boxes have no masks although the pipeline loads masks. While
            samples are made: a picture has another size than its annotation says.
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
        check_there((info["img_path"] for info in data), str(self.ann_file))
        boxes = [(*box["bbox"], info["width"], info["height"]) for info in data for box in info["instances"]]
        start, end, size = np.reshape(boxes, (-1, 3, 2)).swapaxes(0, 1)
        beyond, no_corners = (wrong.any(1).sum() for wrong in (end > 1.1 * size, end < 2 * start))
        if beyond > no_corners:
            raise InputError(
                f"{self.ann_file} has {beyond} of {len(boxes)} boxes that reach beyond their pictures, as if they were "
                "corners x1, y1, x2, y2: write x1, y1, width, height"
            )
        if any(getattr(step, "with_mask", False) for step in self.pipeline.transforms):
            check_masks(data, self.ann_file)
        return data

    def filter_data(self) -> list[dict[str, Any]]:
        data = super().filter_data()
        if not data:
            raise InputError(f"{self.ann_file} has no picture with a box of the classes asked for")
        return data

    def prepare_data(self, idx: int) -> dict[str, Any] | None:
        data, info = super().prepare_data(idx), self.get_data_info(idx)
        check_size(data, info["img_path"], (info["height"], info["width"]), self.ann_file)
        return data
