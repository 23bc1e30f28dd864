"""Checks shared by the data sets of mmdet and mmseg. Bad data raise an ``InputError`` that names the file."""

from collections.abc import Iterable
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
    """The data sample of a picture, the first one if test-time augmentation makes several."""
    samples = data["data_samples"]
    return samples[0] if isinstance(samples, list) else samples


def check_there(paths: Iterable[str], listed_in: str) -> None:
    """Raise an ``InputError`` if a file is missing. Each folder is listed only once, as COCO has 118,000 pictures."""
    wanted = [Path(path) for path in paths]
    folders = {path.parent for path in wanted}
    there = {entry for folder in folders if folder.is_dir() for entry in folder.iterdir()}
    missing = [path for path in wanted if path not in there]
    if missing:
        others = f" and {len(missing) - 1} more files" if len(missing) > 1 else ""
        raise InputError(f"{listed_in} names {missing[0]}{others}, which {'are' if others else 'is'} not there")
