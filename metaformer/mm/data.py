"""Checks shared by the data sets of mmdet and mmseg. Bad data raise an ``InputError`` that names the file."""

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from metaformer.errors import InputError


class CheckedDataset:
    """Mixin for data sets of mmengine. Errors in the preparation of a sample name the picture.

    Raises:
        InputError: ``classes`` is one text instead of several names or missing, or a picture cannot be used.
    """

    @classmethod
    def _load_metainfo(cls, metainfo: dict[str, Any] | None = None) -> dict[str, Any]:
        classes = (metainfo or {}).get("classes")
        if isinstance(classes, str) and not Path(classes).is_file():
            raise InputError(
                f"classes is the text {classes!r}, each letter of which would be a class: write a tuple with a comma, "
                f"classes=({classes!r},)"
            )
        found = super()._load_metainfo(metainfo)
        if not found.get("classes"):
            raise InputError(f"{cls.__name__} has no classes: name them with metainfo=dict(classes=(...))")
        return found

    def prepare_data(self, idx: int) -> Any:
        try:
            return super().prepare_data(idx)
        except InputError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"cannot use {self.get_data_info(idx)['img_path']}: {reason}") from error


def first_sample(data: dict[str, Any]) -> Any:
    """The data sample of a picture, the first one if test-time augmentation makes several; ``data`` if not packed."""
    samples = data.get("data_samples", data)
    return samples[0] if isinstance(samples, list) else samples


def check_size(data: dict[str, Any] | None, picture: str, size: tuple[int, int] | None, source: str) -> None:
    """Raise an ``InputError`` if a picture had another height and width than ``source`` says (``None``: nothing)."""
    found = first_sample(data or {}).get("ori_shape", size)
    if size and found != size:
        raise InputError(f"{picture} has the height and width {found}, but {source} has {size} for it")


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
