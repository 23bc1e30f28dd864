"""What the data sets of both toolboxes have in common: bad data end in a sentence that names the file."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from metaformer.errors import InputError


class NamesBadFiles:
    """Mixed into a data set of mmengine: an error while a sample is made names the picture."""

    def prepare_data(self, idx: int) -> Any:
        try:
            return super().prepare_data(idx)
        except InputError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"cannot use {self.get_data_info(idx)['img_path']}: {reason}") from error


def check_there(paths: Iterable[str], listed_in: str) -> None:
    """Raise unless every file is there. Each folder is read once: COCO has 118K pictures, on a disk far away."""
    names: dict[Path, set[str]] = {}
    missing = []
    for path in map(Path, paths):
        if path.parent not in names:
            names[path.parent] = {entry.name for entry in path.parent.iterdir()} if path.parent.is_dir() else set()
        if path.name not in names[path.parent]:
            missing.append(path)
    if missing:
        others = f" and {len(missing) - 1} more files" if len(missing) > 1 else ""
        raise InputError(f"{listed_in} names {missing[0]}{others}, which {'are' if others else 'is'} not there")
