"""Checks shared by the data sets of mmdet and mmseg. Bad data raise an ``InputError`` that names the file."""

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from metaformer.errors import InputError, explained


class CheckedDataset:
    """Mixin for data sets of mmengine. Errors in the preparation of a sample name the picture.

    Raises:
        InputError: a picture cannot be used or has another size than :meth:`expected_size`.
    """

    def expected_size(self, info: dict[str, Any]) -> tuple[tuple[int, int] | None, str]:
        """The height and width of a picture (``None`` if unknown), and the file that states them."""
        raise NotImplementedError

    def prepare_data(self, idx: int) -> Any:
        info = self.get_data_info(idx)
        with explained(f"cannot use {info['img_path']}"):
            size, source = self.expected_size(info)
            data = super().prepare_data(idx)
        found = first_sample(data or {}).get("ori_shape")
        check_equal(f"the (height, width) of {info['img_path']}", found, f"{source} has", size)
        return data


def first_sample(data: dict[str, Any]) -> Any:
    """The data sample of a picture, the first one if test-time augmentation makes several; ``data`` if not packed."""
    samples = data.get("data_samples", data)
    return samples[0] if isinstance(samples, list) else samples


def check_equal(name: str, value: Any, other: str, expected: Any) -> None:
    """Raise an ``InputError`` if two values differ that have to be equal; ``None`` is one that is not known."""
    if None not in (value, expected) and value != expected:
        raise InputError(f"{name} is {value}, but {other} {expected}: give both the same")


def check_there(paths: Iterable[str], listed_in: str) -> None:
    """Raise an ``InputError`` if a file is missing. Each folder is listed only once, as COCO has 118,000 pictures."""
    wanted = [Path(path) for path in paths]
    there = {entry for folder in {path.parent for path in wanted} if folder.is_dir() for entry in folder.iterdir()}
    missing = [path for path in wanted if path not in there]
    if missing:
        raise InputError(f"{listed_in} names files that are not there ({len(missing)}), first {missing[0]}")


def check_masks(data: Collection[dict[str, Any]], listed_in: str) -> None:
    """Raise an ``InputError`` if a box of a picture has no mask."""
    without = [info["img_path"] for info in data if any("mask" not in box for box in info["instances"])]
    if without:
        raise InputError(
            f"{listed_in} has boxes without a mask ('segmentation') in {len(without)} of {len(data)} pictures, first "
            f"in {without[0]}: Mask R-CNN needs them, also for 'segm' in the metric of an evaluator; RetinaNet does not"
        )
