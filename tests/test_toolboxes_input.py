"""Checkpoints and data that are not what mmdet and mmseg are told: one sentence each, and nothing used in part."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from PIL import Image

import metaformer.mm.detection
import metaformer.mm.segmentation
from drawn import detection_config, draw_coco, draw_scenes, segmentation_config
from metaformer import InputError
from metaformer.errors import as_raised
from metaformer.mm.predict import load_model
from oracles import OFFICIAL_NAMES, renamed


def runner(config: Path, work_dir: Path, **settings) -> Runner:
    config = Config.fromfile(config)
    config.merge_from_dict({"work_dir": str(work_dir), **settings})
    return Runner.from_cfg(config)


@pytest.fixture(scope="module")
def segmentor(tmp_path_factory):
    """(config, checkpoint) of a segmentor that has trained for 2 of its 4 iterations."""
    folder = tmp_path_factory.mktemp("whole")
    # Nothing random but the order of the pictures: mmengine does not save the state of the generators.
    steady = """
train_dataloader["dataset"]["pipeline"][2] = dict(type="Resize", scale=(64, 64), keep_ratio=False)
model["decode_head"]["dropout_ratio"] = 0.0
"""
    config = segmentation_config(folder / "tiny.py", draw_scenes(folder / "data"), more=steady)
    once = runner(config, folder / "half")
    # The schedule stays that of 4 iterations, as for a run that was stopped.
    once._train_loop.update(max_iters=2)
    once.train()
    return config, folder / "half/iter_2.pth"


def test_a_resumed_run_ends_as_an_uninterrupted_one(segmentor, tmp_path):
    config, checkpoint = segmentor
    whole = runner(config, tmp_path / "whole")
    resumed = runner(config, tmp_path / "resumed", load_from=str(checkpoint), resume=True)
    for run in (whole, resumed):
        run.train()
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name
    assert resumed.message_hub.get_scalar("train/loss").data[0].shape == (4,)


def test_another_model_is_refused(segmentor, tmp_path):
    config, checkpoint = segmentor
    spoiled = torch.load(checkpoint)
    other = {"model.backbone.variant": "poolformer_s24"}
    with pytest.raises(InputError, match=r"iter_2\.pth holds another model than the config builds: 120 missing"):
        runner(config, tmp_path / "a", load_from=str(checkpoint), **other).test()
    with pytest.raises(InputError, match="120 missing"):
        runner(config, tmp_path / "b", load_from=str(checkpoint), resume=True, **other).train()
    with pytest.raises(InputError, match="120 missing"):
        runner(config, tmp_path / "c", load_from=str(checkpoint), **other).train()
    with pytest.raises(InputError, match="there is no checkpoint"):
        runner(config, tmp_path / "d", load_from=str(tmp_path / "no.pth")).test()
    with pytest.raises(InputError, match=r"20 missing .* 20 unexpected"):
        load_model(str(config), str(save(spoiled, tmp_path, "backbone.stages.0", "backbone.stages.9")), "cpu")


def save(checkpoint: dict, folder: Path, old: str, new: str) -> Path:
    """The checkpoint with other names, as a file."""
    weights = {name.replace(old, new): tensor for name, tensor in checkpoint["state_dict"].items()}
    torch.save({**checkpoint, "state_dict": weights}, folder / "renamed.pth")
    return folder / "renamed.pth"


def test_fine_tuning_on_other_classes_keeps_all_but_the_classifier(segmentor, tmp_path, monkeypatch):
    _, checkpoint = segmentor
    data = draw_scenes(tmp_path / "data")
    other = segmentation_config(
        tmp_path / "other.py",
        data,
        more="""
model.update(decode_head=dict(num_classes=5))
for loader in (train_dataloader, val_dataloader):
    loader["dataset"]["metainfo"] = dict(classes=("sky", "ground", "house", "tree", "cat"))
train_cfg.update(max_iters=1, val_interval=9)
""",
    )
    logged = []
    monkeypatch.setattr(metaformer.mm.hooks, "print_log", lambda message, **_: logged.append(message))
    tuned = runner(other, tmp_path / "tuned", load_from=str(checkpoint))
    tuned.optim_wrapper["optimizer"]["lr"] = 0.0
    tuned.optim_wrapper["optimizer"]["weight_decay"] = 0.0
    tuned.train()
    before = torch.load(checkpoint)["state_dict"]
    assert "2 of another shape (decode_head.conv_seg.bias, decode_head.conv_seg.weight)" in logged[0]
    for name, parameter in tuned.model.named_parameters():
        if "conv_seg" not in name:
            assert torch.equal(parameter, before[name]), name


def test_the_authors_segmentors_are_read(segmentor, tmp_path):
    """Under the official code's names of the backbone and its level norms: the same logits."""
    config, checkpoint = segmentor
    content = torch.load(checkpoint)
    names = [(r"^backbone\.", ""), *OFFICIAL_NAMES, (r"^out_norms\.(\d)\.", lambda m: f"norm{2 * int(m[1])}.")]
    trunk = {name: t for name, t in content["state_dict"].items() if name.startswith("backbone.")}
    head = {name: t for name, t in content["state_dict"].items() if name not in trunk}
    theirs = {f"backbone.{name}": t for name, t in renamed(trunk, names).items()}
    assert "backbone.norm6.weight" in theirs
    assert "backbone.network.0.0.layer_scale_1" in theirs
    torch.save({"state_dict": {**theirs, **head}}, tmp_path / "official.pth")
    images = torch.randn(1, 3, 64, 64)
    ours, official = (load_model(str(config), str(path), "cpu") for path in (checkpoint, tmp_path / "official.pth"))
    assert torch.equal(ours(images), official(images))
    tested = runner(config, tmp_path / "tested", load_from=str(tmp_path / "official.pth"))
    tested.test()
    for name, tensor in tested.model.state_dict().items():
        assert torch.equal(tensor, content["state_dict"][name])


def test_training_stops_at_a_loss_that_is_not_finite(segmentor, tmp_path):
    config, _ = segmentor
    diverging = runner(config, tmp_path / "nan")
    diverging.optim_wrapper["optimizer"]["lr"] = 1e30
    with pytest.raises(InputError, match=r"the loss is \S+ at iteration \d: lower the learning rate"):
        diverging.train()


def test_a_head_for_other_classes_is_refused(segmentor, tmp_path):
    config, _ = segmentor
    with pytest.raises(InputError, match=r"decode_head predicts 7 classes, but the data set has 3: .*=3"):
        runner(config, tmp_path / "heads", **{"model.decode_head.num_classes": 7}).train()


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda d: (d / "train/003.jpg").unlink(), r"train.json names .*003.jpg, which is not there"),
        (lambda d: [p.unlink() for p in (d / "train").iterdir()], r"names .*jpg and 7 more files, which are not there"),
        (lambda d: (d / "annotations/train.json").unlink(), r"there is no annotation file .*cocodataset.org"),
        (lambda d: (d / "annotations/train.json").write_text('{"images": [{"id'), "not an annotation file"),
        (lambda d: (d / "annotations/train.json").write_text('{"images": []}'), "not an annotation file|0 of the 2"),
        (lambda d: edit(d / "annotations/train.json", lambda c: c.update(annotations=[])), "no picture with a box"),
        (lambda d: edit(d / "annotations/train.json", lambda c: c.update(images=[])), "lists no picture"),
        (
            lambda d: edit(d / "annotations/train.json", lambda c: c["categories"][1].update(name="cat")),
            "has 1 of the 2 classes",
        ),
        (
            lambda d: edit(
                d / "annotations/train.json", lambda c: [a.pop("segmentation") for a in c["annotations"][:1]]
            ),
            "boxes without a mask .* in 1 of 8 pictures, first in .*000.jpg: Mask R-CNN needs",
        ),
    ],
)
def test_wrong_detection_data(tmp_path, spoil, says):
    data = draw_coco(tmp_path / "data")
    spoil(data)
    config = Config.fromfile(detection_config(tmp_path / "tiny.py", data))
    init_default_scope("mmdet")
    with pytest.raises(InputError, match=says):
        Runner.build_dataloader(config.train_dataloader)


def test_boxes_alone_are_enough_for_retinanet(tmp_path):
    data = draw_coco(tmp_path / "data")
    edit(data / "annotations/train.json", lambda c: [a.pop("segmentation") for a in c["annotations"]])
    config = Config.fromfile(
        detection_config(tmp_path / "tiny.py", data, base="retinanet_poolformer-s12_fpn_8xb2-1x_coco")
    )
    init_default_scope("mmdet")
    assert len(list(Runner.build_dataloader(config.train_dataloader))) == 4


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda d: [p.unlink() for p in (d / "annotations/training").iterdir()], "names .*png and 7 more files"),
        (lambda d: (d / "annotations/training/002.png").unlink(), r"names .*002.png, which is not there"),
        (lambda d: [p.unlink() for p in (d / "images/training").iterdir()], r"there is no picture \*.jpg in"),
        (lambda d: (d / "images").rename(d / "pictures"), "there is no folder .*ADEChallengeData2016.zip"),
        (lambda d: (d / "images/training/001.jpg").write_text("no picture"), r"cannot use .*001.jpg"),
        (
            lambda d: (d / "annotations/training/001.png").write_text("no picture"),
            r"001.png is not a picture of labels",
        ),
        (
            lambda d: Image.fromarray(np.full((71, 90), 256, np.uint16)).save(d / "annotations/training/001.png"),
            r"001.png has pixels of the kind I;16",
        ),
        (lambda d: Image.new("RGB", (90, 71)).save(d / "annotations/training/001.png"), "pixels of the kind RGB"),
        (
            lambda d: Image.fromarray(np.full((71, 90), 4, np.uint8)).save(d / "annotations/training/001.png"),
            r"001.png has the label 3 after reduce_zero_label, but the 3 classes have the labels 0 to 2",
        ),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_wrong_segmentation_data(tmp_path, spoil, says, workers):
    data = draw_scenes(tmp_path / "data")
    spoil(data)
    config = Config.fromfile(segmentation_config(tmp_path / "tiny.py", data))
    config.train_dataloader.update(num_workers=workers, sampler={"type": "DefaultSampler", "shuffle": False})
    init_default_scope("mmseg")
    with pytest.raises(InputError) as caught:
        list(Runner.build_dataloader(config.train_dataloader))
    sentence = as_raised(caught.value)
    assert re.search(says, sentence)
    assert "\n" not in sentence
