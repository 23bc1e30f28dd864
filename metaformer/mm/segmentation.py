"""Registers the backbone, the hooks and data sets for mmseg: ``custom_imports = dict(imports=[...])`` names it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.registry import DATASETS
from mmseg.datasets import ADE20KDataset, BaseSegDataset
from PIL import Image

from metaformer.errors import InputError, explained
from metaformer.mm import backbone, hooks  # noqa: F401  (registers them)
from metaformer.mm.data import CheckedDataset, check_there, first_sample
from metaformer.mm.hooks import different_classes

LOOKED_AT = 50
"""Label maps of a data set that are read when it is opened."""
ADE20K_PAGE = "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip"


class CheckedSegmentation(CheckedDataset):
    """Mixin for data sets of mmseg that refuses bad data.

    Raises:
        InputError: there are fewer than two classes, or others than those of the data set; the list of pictures, all
            pictures, a picture of the list or the label map of a picture is missing, a picture has another ending, or
            label maps have 255 for the second class.
            While samples are made: a label map is not one byte per pixel, has another size than its picture, or a label
            outside the classes.
    """

    @classmethod
    def get_label_map(cls, new_classes: Sequence[str] | None) -> None:
        classes = (new_classes,) if isinstance(new_classes, str) else new_classes or ()  # a text lacks its comma
        if len(classes) < 2:  # the loss of a softmax over one class is 0
            raise InputError(
                f"{cls.__name__} has the classes {classes}: name two or more with metainfo=dict(classes=(...)), such "
                "as 'background' for the other pixels"
            )
        # mmseg would give the labels of a map new numbers, by the place of their names in METAINFO.
        if difference := different_classes(cls.METAINFO.get("classes", new_classes), new_classes):
            raise InputError(f"{cls.__name__} has other classes ({difference}): use type='CheckedSegDataset' for yours")

    def load_data_list(self) -> list[dict[str, Any]]:
        if self.ann_file and not Path(self.ann_file).exists():
            raise InputError(f"there is no list of pictures {self.ann_file} (from {Path.cwd()}), which ann_file names")
        folder = self.data_prefix["img_path"]
        data = super().load_data_list() if Path(folder).is_dir() else []
        if not data:
            raise InputError(
                f"there is no picture *{self.img_suffix} in {folder} (from {Path.cwd()}): get ADE20K from "
                f"{ADE20K_PAGE} and unpack it as segmentation/README.md shows, or name yours in data_root, data_prefix"
            )
        check_there((info["img_path"] for info in data), str(self.ann_file))
        maps = {Path(info["seg_map_path"]) for info in data if "seg_map_path" in info}
        check_there(maps, folder)
        if maps and not self.ann_file:
            for path in Path(folder).rglob("*"):
                name = f"{path.relative_to(folder).with_suffix('')}{self.seg_map_suffix}"
                own = Path(self.data_prefix["seg_map_path"], name)
                if own not in maps and own != path and own.is_file():
                    raise InputError(
                        f"{path} would be left out, because its name does not end in img_suffix={self.img_suffix!r}: "
                        "give all pictures one ending, or list those to use in ann_file"
                    )
        if len(self.metainfo["classes"]) == 2:
            labels = set()
            for path in sorted(maps)[:: len(maps) // LOOKED_AT + 1]:
                with explained(f"cannot use {path}"), Image.open(path) as label_map:
                    labels.update(np.unique(label_map).tolist())
            if labels == {0, self.ignore_index}:
                where = self.data_prefix["seg_map_path"]
                raise InputError(
                    f"the label maps in {where} have the labels 0 and {self.ignore_index} alone, and the latter is "
                    "ignored: write the number of the second class in its place"
                )
        return data

    def expected_size(self, info: dict[str, Any]) -> tuple[tuple[int, int] | None, str]:
        """Those of the label map. mmseg would truncate 16-bit labels and read colours as labels."""
        path = info.get("seg_map_path")
        if not path:
            return None, ""
        with Image.open(path) as labels:
            mode, (width, height) = labels.mode, labels.size
        if mode not in ("L", "P"):
            raise InputError(
                f"{path} has pixels of the kind {mode}: a label map has one byte each (L, or P for a palette)"
            )
        return (height, width), path

    def prepare_data(self, idx: int) -> dict[str, Any]:
        data = super().prepare_data(idx)
        truth = first_sample(data).get("gt_sem_seg")
        path, classes = self.get_data_info(idx).get("seg_map_path"), len(self.metainfo["classes"])
        if truth is not None:
            labels = truth.data[truth.data != self.ignore_index]
            if labels.numel() and labels.max() >= classes:
                shift = " after reduce_zero_label" if self.reduce_zero_label else ""
                raise InputError(
                    f"{path} has the label {labels.max().item()}{shift}, but the {classes} classes have the labels "
                    f"0 to {classes - 1}, and {self.ignore_index} is ignored"
                )
        return data


@DATASETS.register_module()
class CheckedADE20KDataset(CheckedSegmentation, ADE20KDataset):
    """ADE20K with its 150 classes."""


@DATASETS.register_module()
class CheckedSegDataset(CheckedSegmentation, BaseSegDataset):
    """Other data in the same layout; name the classes with ``metainfo=dict(classes=(...))``."""
