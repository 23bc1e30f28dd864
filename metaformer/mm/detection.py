"""Registers the backbone, the hooks and data sets for mmdet: ``custom_imports = dict(imports=[...])`` names it."""

import json
from pathlib import Path
from typing import Any

from mmdet.datasets import CocoDataset
from mmdet.datasets.api_wrappers import COCO
from mmdet.evaluation import CocoMetric
from mmengine.registry import DATASETS, METRICS

from metaformer.errors import InputError
from metaformer.mm import backbone, hooks  # noqa: F401  (registers them)
from metaformer.mm.data import CheckedDataset, check_equal, check_masks, check_there

COCO_PAGE = "https://cocodataset.org/#download"


class CheckedCoco(COCO):
    """An annotation file whose categories must be the classes asked for, in the same order.

    mmdet numbers the classes it finds 0, 1, ... in the order of the file, whatever the order of ``classes``. It leaves
    out a box of an unknown category, without area or with a side below one pixel, and a picture whose id occurs again.
    It reads an RLE mask as if its size were that of the picture, and cannot evaluate a box without ``iscrowd``.
    pycocotools writes the id of the object that was found into an array of numbers, and 0 for none.
    """

    def __init__(self, annotation_file: str):
        super().__init__(annotation_file)
        self.path = annotation_file
        if len(self.imgs) < len(self.dataset["images"]):
            raise InputError(f"{self.path} has two pictures with the same id")
        beyond = no_corners = left_out = 0
        for box in self.anns.values():
            known = box["category_id"] in self.cats and box.get("iscrowd") in (0, 1) and len(box["bbox"]) == 4
            if not known or not isinstance(box["id"], int) or box["id"] == 0:
                needs = (
                    "a listed category_id, an iscrowd (0: one object, or 1), a bbox of 4 numbers, an integer id above 0"
                )
                raise InputError(f"annotation {box['id']} of {self.path} needs {needs}")
            if picture := self.imgs.get(box["image_id"]):
                mask, size = box.get("segmentation"), [picture["height"], picture["width"]]
                if isinstance(mask, dict):
                    name = f"the [height, width] of the mask of annotation {box['id']} of {self.path}"
                    check_equal(name, mask["size"], "its picture has", size)
                x, y, width, height = box["bbox"]
                beyond += y + height > 1.1 * size[0] or x + width > 1.1 * size[1]
                no_corners += width < x or height < y
                left_out += box["area"] <= 0 or min(width, height) < 1
        if beyond > no_corners or 2 * left_out > len(self.anns):
            raise InputError(
                f"of the {len(self.anns)} boxes of {self.path}, {beyond} reach beyond their pictures, as if they were "
                f"corners, and {left_out} have no area or a side below one pixel, as if they were fractions: write an "
                "area and x1, y1, width, height in pixels"
            )

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
        InputError: the annotation file is missing, damaged, or has other classes; boxes are given by their corners or
            as fractions; a picture is missing; no picture has a box; boxes have no masks although the pipeline loads
            masks. While samples are made: a picture has another size than its annotation says.
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
        if any(getattr(step, "with_mask", False) for step in self.pipeline.transforms):
            check_masks(data, self.ann_file)
        return data

    def filter_data(self) -> list[dict[str, Any]]:
        data = super().filter_data()
        if not data:
            raise InputError(
                f"{self.ann_file} has no picture with a box of the classes asked for and sides of filter_cfg.min_size"
            )
        return data

    def expected_size(self, info: dict[str, Any]) -> tuple[tuple[int, int], str]:
        return (info["height"], info["width"]), self.ann_file


@METRICS.register_module()
class CheckedCocoMetric(CocoMetric):
    """mmdet's ``CocoMetric``; raises an ``InputError`` if its annotation file is missing."""

    def __init__(self, ann_file: str | None = None, **settings: Any):
        if ann_file and not Path(ann_file).is_file():
            raise InputError(f"there is no annotation file {ann_file}: give each evaluator that of its dataloader")
        super().__init__(ann_file, **settings)
