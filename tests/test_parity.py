"""The training batch against timm's own loader, which the official script uses, the command, and its wrong input.

The recipe and the training loop of the official code are compared with a clone alone, by analysis/parity.py.
"""

import json
import re
import subprocess
from functools import partial
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import timm
import torch
from timm.data.loader import PrefetchLoader
from timm.data.mixup import FastCollateMixup, rand_bbox
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import nn
from torch.func import functional_call

from conftest import ROOT, TINY
from metaformer import convert
from metaformer.analysis import official, parity
from metaformer.records.schema import Clone
from metaformer.training.batches import seed_everything
from metaformer.training.config import CONFIGS, Config, load_config
from metaformer.training.distributed import Processes
from metaformer.training.engine import Trainer
from metaformer.training.recipe import Mixing
from oracles import SMALL

CPU = torch.device("cpu")


def test_cutmix_boxes_lose_the_odd_pixel_of_todays_timm():
    rng = np.random.default_rng(0)
    odd = 0
    for number, lam in enumerate(rng.random(300)):
        boxes = []
        for box in (official.pinned_box, rand_bbox):
            np.random.seed(number)
            boxes.append(np.array(box((3, 37, 37), lam)))
        is_odd = int(37 * np.sqrt(1 - lam)) % 2
        lost = boxes[1] - boxes[0]
        assert not lost[::2].any()  # where it begins
        assert ((lost[1::2] == is_odd) | ((boxes[1][1::2] == 37) & (lost[1::2] == 0))).all()
        odd += is_odd
    assert 100 < odd < 200


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_mixing_gives_the_values_of_fast_collate_mixup(mode):
    options = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "label_smoothing": 0.1, "num_classes": 5, "mode": mode}
    generator = torch.Generator().manual_seed(0)
    for number in range(40):
        images = torch.randint(256, (6, 3, 37, 37), generator=generator, dtype=torch.uint8)
        labels = torch.arange(6) % 5
        np.random.seed(number)
        mixed, targets = Mixing(**options)(images, labels)
        np.random.seed(number)
        with patch("timm.data.mixup.rand_bbox", official.pinned_box):
            expected = FastCollateMixup(**options)(list(zip(images.numpy().copy(), labels.tolist(), strict=True)))
        assert torch.equal(mixed, expected[0].float())
        assert torch.equal(targets, expected[1])


def test_a_step_mixes_then_normalises_then_erases_as_timms_prefetcher(pictures, tmp_path):
    settings = ["mixup=0.8", "smoothing=0.1", "erase_prob=0.5", "device_batch=8", "opt=sgd", "opt_betas=null"]
    (tmp_path / "empty.yaml").write_text("")
    config = load_config([str(tmp_path / "empty.yaml"), f"data_dir={pictures}", f"output={tmp_path}", *TINY, *settings])
    trainer, seen = Trainer(config, Processes(CPU)), []
    trainer.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    collate = FastCollateMixup(mixup_alpha=0.8, label_smoothing=0.1, num_classes=3)
    for step, (images, labels) in enumerate(trainer.epoch_batches()):
        seed_everything(config.seed, 0, step, 0)
        mixed = collate(list(zip(images.numpy(), labels.tolist(), strict=True)))
        ((expected, _),) = PrefetchLoader([mixed], device=CPU, re_prob=0.5, re_mode="pixel")
        trainer.progress.step = step
        trainer.optimizer_step(iter([(images, labels)]))
        assert torch.equal(seen[-1], expected)
    assert len(seen) == 3


def test_the_crops_ratio_is_timms():
    ratio = RandomResizedCropAndInterpolation(224).ratio
    assert load_config([str(CONFIGS / "imagenet.yaml")]).ratio == Config().ratio == tuple(ratio)


class Renamed(nn.Module):
    """A model of ours under the official names, whose logits are multiplied by a factor."""

    default_cfg = None

    def __init__(self, model: nn.Module, factor: float):
        super().__init__()
        self.ours, self.factor = [model], factor  # a list, so that its parameters are not listed as well
        for name, parameter in convert(dict(model.named_parameters()), "official").items():
            *path, last = name.split(".")
            place = self
            for part in path:
                place.add_module(part, getattr(place, part, None) or nn.Module())
                place = getattr(place, part)
            place.register_parameter(last, parameter)

    def forward(self, images):
        return self.factor * functional_call(self.ours[0].double(), convert(dict(self.named_parameters())), images)


@pytest.mark.parametrize("error", [0.0, 1e-6])
def test_a_model_that_computes_something_else_is_found(error, monkeypatch):
    monkeypatch.setattr(timm, "create_model", partial(timm.create_model, **SMALL))
    model = timm.create_model("metaformer_s12_identity")
    train = SimpleNamespace(models=SimpleNamespace(metaformer_id_s12=lambda: Renamed(model, 1 + error)))
    rows = list(parity.compare_model(train, "metaformer_s12_identity"))
    assert [row["what"] for row in rows] == ["logits", "gradients of all parameters"]
    for row in rows:
        assert row["difference"] == pytest.approx(error, rel=1e-3, abs=row["tolerance"])
        assert (row["difference"] > row["tolerance"]) == bool(error)


def test_what_is_not_a_number_differs_most():
    one, none = torch.ones(2), torch.full((2,), torch.nan)
    assert parity.relative({"a": one, "b": none}, {"a": one, "b": one}) == torch.inf
    assert parity.relative({"a": one, "b": one}, {"a": one, "b": none}) == torch.inf
    assert parity.compared("recipe", "pixels", none.max())["difference"] == torch.inf


@pytest.mark.parametrize("is_clone", [True, False])
def test_an_archive_in_a_repository_of_the_user_has_no_commit(is_clone, tmp_path, monkeypatch):
    (tmp_path / "official/models").mkdir(parents=True)
    (tmp_path / "official/train.py").touch()
    repository = tmp_path / "official" if is_clone else tmp_path
    for words in ("init", "-c user.name=a -c user.email=a commit --allow-empty --message a"):
        subprocess.run(["git", "-C", repository, *words.split()], check=True, capture_output=True)
    for name, value in (("MODELS", {}), *((f"compare_{name}", lambda *_: []) for name in ("recipe", "trajectory"))):
        monkeypatch.setattr(parity, name, value)
    monkeypatch.setattr(parity, "load_official", lambda clone: None)
    monkeypatch.setattr(parity, "departures", lambda trajectories: [])
    said = str(Clone(**parity.measure(tmp_path / "official")["official"]))
    assert re.fullmatch(r"commit [0-9a-f]{40} with local changes" if is_clone else "commit unknown", said)


def test_the_status_tells_whether_anything_differs(monkeypatch, command, tmp_path):
    (path,) = (ROOT / "analysis/results").glob("parity-*.json")
    record = json.loads(path.read_text())
    monkeypatch.setattr(parity, "measure", lambda clone: record)
    for difference, expected in ((0.0, 0), (1e-3, 1)):
        record["compared"][0]["difference"] = difference
        status, printed, _ = command("analysis/parity.py", "clone", "--record", tmp_path / "record.json")
        assert (status, printed.count("unexplained")) == (expected, expected)
        assert json.loads((tmp_path / "record.json").read_text())["compared"] == record["compared"]
    status, printed, error = command("analysis/parity.py", "clone", "--record", "/dev/null/record.json")
    assert (status, "gradients of all parameters" in printed) == (2, True)  # minutes of work are not lost
    assert error.startswith("error: cannot write /dev/null/record.json")


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "No such file or directory: '{clone}/models/__init__.py'"),
        ({"models/__init__.py": ""}, "No such file or directory: '{clone}/train.py'"),
        ({"models/__init__.py": "", "train.py": ""}, "module 'train' has no attribute 'main'"),
        ({"models/__init__.py": "import nothing_of_this_name"}, "No module named 'nothing_of_this_name'"),
    ],
)
def test_another_folder_than_a_clone_ends_in_one_sentence(files, reason, tmp_path, command):
    clone = tmp_path / "clone"
    for name, text in files.items():
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).write_text(text)
    status, printed, error = command("analysis/parity.py", clone)
    assert (status, printed, error.count("\n")) == (2, "", 1)
    assert f"{clone} is no clone of https://github.com/sail-sg/poolformer that can be imported: " in error
    assert reason.format(clone=clone) in error
