"""For mmseg's configs: ``custom_imports = dict(imports=['metaformer.mm.segmentation'])``."""

from pathlib import Path
from typing import Any

from mmengine.registry import DATASETS
from mmseg.datasets import ADE20KDataset, BaseSegDataset
from PIL import Image

import metaformer.mm  # noqa: F401  (registers the backbone and the hooks)
from metaformer.errors import InputError
from metaformer.mm.data import NamesBadFiles, check_there

ADE20K_PAGE = "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip"


class CheckedSegmentation(NamesBadFiles):
    """Mixed into a data set of mmseg: wrong data end in a sentence.

    Raises:
        InputError: no folder, no picture in it, a picture without its label map; while samples are made, a file that
            is not what it should be, a label outside the classes.
    """

    def load_data_list(self) -> list[dict[str, Any]]:
        for folder in filter(None, (self.data_prefix.get("img_path"), self.data_prefix.get("seg_map_path"))):
            if not Path(folder).is_dir():
                raise InputError(
                    f"there is no folder {folder} (from {Path.cwd()}): get ADE20K from {ADE20K_PAGE} and unpack it as "
                    "segmentation/README.md shows, or name yours with data_root and data_prefix"
                )
        data = super().load_data_list()
        if not data:
            raise InputError(f"there is no picture *{self.img_suffix} in {self.data_prefix['img_path']}")
        check_there((info["img_path"] for info in data), str(self.ann_file))
        check_there((info["seg_map_path"] for info in data if "seg_map_path" in info), self.data_prefix["img_path"])
        return data

    def prepare_data(self, idx: int) -> dict[str, Any]:
        info = self.get_data_info(idx)
        if "seg_map_path" in info:
            check_label_map(info["seg_map_path"])
        sample = super().prepare_data(idx)
        truth = sample["data_samples"].get("gt_sem_seg")
        classes = len(self.metainfo["classes"])
        if truth is not None:
            labels = truth.data[truth.data != self.ignore_index]
            if labels.numel() and labels.max() >= classes:
                shift = " after reduce_zero_label" if self.reduce_zero_label else ""
                raise InputError(
                    f"{info['seg_map_path']} has the label {labels.max().item()}{shift}, but the "
                    f"{classes} classes have the labels 0 to {classes - 1}, and {self.ignore_index} is ignored"
                )
        return sample


def check_label_map(path: str) -> None:
    """Raise unless the file holds a byte for each pixel: mmseg cuts more to a byte in silence, and takes colours."""
    try:
        with Image.open(path) as labels:
            mode = labels.mode
    except OSError as error:
        raise InputError(f"{path} is not a picture of labels: {error}") from error
    if mode not in ("L", "P"):
        raise InputError(
            f"{path} has pixels of the kind {mode}: a label map has one byte for each (L, or P for a palette)"
        )


@DATASETS.register_module()
class CheckedADE20KDataset(CheckedSegmentation, ADE20KDataset):
    """ADE20K with its 150 classes."""


@DATASETS.register_module()
class CheckedSegDataset(CheckedSegmentation, BaseSegDataset):
    """Other data in the same layout; name the classes with ``metainfo=dict(classes=(...))``."""
