"""The training batch against timm's own loader, which the official script uses, and the command's wrong input."""

from unittest.mock import patch

import numpy as np
import pytest
import torch
from timm.data.loader import PrefetchLoader
from timm.data.mixup import FastCollateMixup, rand_bbox
from timm.data.transforms import RandomResizedCropAndInterpolation

from conftest import TINY
from metaformer.analysis import official
from metaformer.training.batches import seed_everything
from metaformer.training.config import CONFIGS, Config, load_config
from metaformer.training.distributed import Processes
from metaformer.training.engine import Trainer
from metaformer.training.recipe import Mixing

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
        mixed, targets = Mixing(37, **options)(images, labels)
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
