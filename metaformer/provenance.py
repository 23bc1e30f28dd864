"""The provenance of a result (command, commit, versions, hardware, date), and atomic writing of files."""

import hashlib
import io
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch

from metaformer.errors import InputError

PACKAGES = (
    *("metaformer", "torch", "torchvision", "timm", "numpy", "pillow", "transformers", "fvcore"),
    *("onnx", "onnxruntime", "openvino"),
    *("mmengine", "mmcv-lite", "mmcv", "mmdet", "mmsegmentation", "opencv-python", "pycocotools"),
)


def provenance() -> dict[str, Any]:
    """Returns command, commit (and whether files differ from it), versions, hardware and the current time, for JSON."""
    # A repository of the user's that only contains an environment with this package has another history.
    tracked = git("ls-files", "--error-unmatch", Path(__file__).name)
    changes = git("status", "--porcelain", "--untracked-files=no") if tracked else None
    return {
        # The launcher sets this variable, because the processes that it starts have another command line.
        "command": os.environ.get("METAFORMER_COMMAND") or shlex.join(["python", *sys.argv]),
        "commit": git("rev-parse", "HEAD") if tracked else None,
        "uncommitted_changes": None if changes is None else bool(changes),
        "versions": {"python": platform.python_version(), **installed(), "cuda": torch.version.cuda},
        "hardware": {
            "cpu": cpu_name(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),  # processors of one name differ in it
            "cores": cores(),
            "torch_threads": torch.get_num_threads(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def cores() -> int:
    """Returns how many processor cores this process may use: those of the machine, its affinity or its container's
    quota, whichever is least."""
    from joblib import cpu_count  # here, because the import takes 0.1 s

    return cpu_count()


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


@cache  # because reading the metadata of every package takes 10 ms
def installed() -> dict[str, str]:
    # Python imports the first of several versions on its path.
    found = {package: next(iter(distributions(name=package)), None) for package in PACKAGES}
    return {package: distribution.version for package, distribution in found.items() if distribution}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def git(*arguments: str) -> str | None:
    """Returns the output of a git command in this checkout, or ``None`` outside a checkout or without git."""
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an ``OSError`` in the block into an ``InputError`` that names ``path``."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def write_file(path: Path, content: bytes | memoryview, previous: Path | None = None) -> None:
    """Writes a file whole, and the folders above it: a temporary file beside ``path`` is renamed when it is complete.

    A reader of ``path`` finds either all of the old content or all of the new.

    Args:
        previous: path that the old file is renamed to. A process that is killed between the two renamings leaves no
            ``path``, but leaves this file.

    Raises:
        InputError: the file cannot be written. The old file is unchanged then.
    """
    beside = path.parent / f"{path.name}.tmp"
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with beside.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            if previous and path.exists():
                path.replace(previous)
            beside.replace(path)
        except OSError:
            beside.unlink(missing_ok=True)
            raise


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file; raises an ``InputError`` if it is missing, damaged or holds something else than a mapping."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"cannot read {path}: it holds a {type(content).__name__}, not a mapping")
    return content


def write_json(path: Path, record: dict[str, Any]) -> None:
    write_file(path, json.dumps(record, indent=2).encode() + b"\n")


def write_torch(path: Path, content: Any, previous: Path | None = None) -> None:
    """Writes ``content`` in the format of ``torch.save``; the arguments are those of :func:`write_file`."""
    buffer = io.BytesIO()  # torch.save would replace the errors of a disk by its own
    torch.save(content, buffer)
    write_file(path, buffer.getbuffer(), previous)
