import gc
import io
import json
import os
import runpy
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from PIL import Image

# The tests expect a CPU's rounding, defaults and number of processes, also on a machine with a GPU. This variable
# selects a GPU for the test that needs one.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

ROOT = Path(__file__).parents[1]
TINY = [
    "model_args={depths: [1, 1, 2, 1], dims: [8, 12, 16, 24]}",
    "img_size=32",
    "global_batch=8",
    "device_batch=4",
    "epochs=2",
    "lr=0.002",
    "workers=0",
    "log_interval=1",
]
"""A small model on small pictures; the code is that of every other run."""
EVERYTHING_RANDOM = [
    "auto_augment=rand-m9-mstd0.5-inc1",
    "mixup=0.8",
    "cutmix=1.0",
    "smoothing=0.1",
    "erase_prob=0.5",
    "drop_path=0.5",
    "drop=0.2",
    "ema_decay=0.9",
]


def pytest_collection_finish() -> None:
    """The garbage collector need not look again and again at what the imports have made."""
    gc.freeze()


def draw(root: Path, train_images: int = 24, val_images: int = 7, classes: Sequence[str] = "abc") -> Path:
    """Class folders of pictures of odd sizes; each class has a colour, so that there is something to learn."""
    rng = np.random.default_rng(0)
    for split, images in (("train", train_images), ("val", val_images)):
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(images // len(classes)):
                pixels = rng.integers(0, 120, (36 + i, 45, 3), dtype=np.uint8)
                pixels[..., label % 3] += 100
                Image.fromarray(pixels).save(root / split / name / f"{i:03d}.png")
    return root


def pack(root: Path, pictures: Path, **shards: int) -> Path:
    """The pictures as a WebDataset with so many shards of each split: pack(root, pictures, train=1, val=2)."""
    root.mkdir()
    splits = {}
    for split, number in shards.items():
        files = sorted((pictures / split).glob("*/*.png"))
        labels = sorted({file.parent.name for file in files})
        names = [f"{split}-{shard:04d}.tar" for shard in range(number)]
        for shard, name in enumerate(names):
            with tarfile.open(root / name, "w") as tar:
                for i, file in list(enumerate(files))[shard::number]:
                    for suffix, content in (
                        ("png", file.read_bytes()),
                        ("cls", str(labels.index(file.parent.name)).encode()),
                    ):
                        member = tarfile.TarInfo(f"{i:04d}.{suffix}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
        lengths = [len(files[shard::number]) for shard in range(number)]
        key = "validation" if split == "val" else split
        splits[key] = {"name": key, "filenames": names, "shard_lengths": lengths, "num_samples": len(files)}
    (root / "_info.json").write_text(json.dumps({"splits": splits}))
    return root


def trained(*arguments: str) -> int:
    """What ``python classification/train.py ARGUMENTS`` does, in this process; returns the exit status."""
    # Imported here, because the process that only distributes the tests to others does not need PyTorch.
    from metaformer.training.config import load_config
    from metaformer.training.engine import train

    return train(load_config(list(arguments)))


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("pictures"), val_images=9)


@pytest.fixture(scope="session")
def shared_run(tmp_path_factory, pictures):
    """shared_run("key=value", ...) gives the folder of a run, trained once for all tests, which may only read it."""

    @cache
    def shared_run(*settings: str) -> Path:
        folder = tmp_path_factory.mktemp("shared")
        (folder / "empty.yaml").write_text("")
        given = (f"data_dir={pictures}", f"output={folder / 'run'}", *TINY, *settings)
        assert trained(str(folder / "empty.yaml"), *given) == 0
        return folder / "run"

    return shared_run


@pytest.fixture
def run(tmp_path, pictures, monkeypatch):
    """Train in this process: run("key=value", ...) gives the run's folder."""
    monkeypatch.chdir(tmp_path)

    def run(*settings: str, output: str = "run", status: int = 0) -> Path:
        config = tmp_path / "empty.yaml"
        config.write_text("")
        assert trained(str(config), f"data_dir={pictures}", f"output={output}", *TINY, *settings) == status
        return tmp_path / output

    return run


@pytest.fixture
def command(capsys):
    """Run a command of the repository in this process, as ``python SCRIPT ARGUMENTS``.

    ``command("classification/validate.py", run)`` gives the exit status, what it printed, and its errors.
    """

    def command(script: str, *arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = run_script(script, *arguments)
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return command


def run_script(script: str, *arguments: object) -> int:
    """The exit status of a command; it finds the environment and signal handlers as they are, and they are put back."""
    with (
        patch.object(sys, "argv", [script, *map(str, arguments)]),
        patch.dict(os.environ),
        pytest.raises(SystemExit) as ended,
    ):
        runpy.run_path(str(ROOT / script), run_name="__main__")
    return ended.value.code or 0


def wait_for(file: Path) -> None:
    wait_until(file.exists)


def wait_until(holds: Callable[[], bool], seconds: float = 300) -> None:
    deadline = time.time() + seconds
    while not holds():
        assert time.time() < deadline, "what was waited for did not happen"
        time.sleep(0.02)
