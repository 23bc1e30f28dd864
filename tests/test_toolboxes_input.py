"""Checkpoints and data that are not what mmdet and mmseg are told: one sentence each, and nothing used in part."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pycocotools.mask
import pytest
import torch
from mmcv.transforms import LoadImageFromFile
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.model import MMDistributedDataParallel
from mmengine.registry import DATASETS, VISUALIZERS, init_default_scope
from mmengine.runner import CheckpointLoader, Runner
from mmengine.runner.checkpoint import load_from_local
from mmengine.structures import InstanceData
from PIL import Image
from torch import nn

import metaformer.mm.detection
import metaformer.mm.patch_mmengine
import metaformer.mm.segmentation
from drawn import SCENES, detection_config, draw_coco, draw_scenes, forget_runs, segmentation_config
from metaformer import InputError
from metaformer.errors import as_raised
from metaformer.mm.config import build_model, read_config
from metaformer.mm.hooks import check_heads
from metaformer.mm.predict import load_model
from oracles import OFFICIAL_NAMES, renamed


def runner(config: Path, work_dir: Path, **settings) -> Runner:
    config = Config.fromfile(config)
    config.merge_from_dict({"work_dir": str(work_dir), **settings})
    forget_runs()
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
    deeper = {"model.backbone.depths": [1, 1, 2, 1]}
    with pytest.raises(InputError, match=r"iter_2\.pth holds another architecture .*\(EncoderDecoder\): 10 missing"):
        runner(config, tmp_path / "a", load_from=str(checkpoint), **deeper).test()
    with pytest.raises(InputError, match="10 missing"):
        runner(config, tmp_path / "b", load_from=str(checkpoint), resume=True, **deeper).train()
    with pytest.raises(InputError, match="10 missing"):
        runner(config, tmp_path / "c", load_from=str(checkpoint), **deeper).train()
    with pytest.raises(InputError, match="there is no checkpoint"):
        runner(config, tmp_path / "d", load_from=str(tmp_path / "no.pth")).test()
    spoiled = torch.load(checkpoint, weights_only=False)
    with pytest.raises(InputError, match=r"10 missing .* 10 unexpected"):
        load_model(str(config), str(save(spoiled, tmp_path, "backbone.stages.0", "backbone.stages.9")), "cpu")
    headless = str(save(spoiled, tmp_path, "decode_head.conv_seg", "decode_head.other"))  # only fine-tuning takes it
    with pytest.raises(InputError, match=r"2 missing .* 2 unexpected"):
        runner(config, tmp_path / "e", load_from=headless).test()
    with pytest.raises(InputError, match=r"2 missing .* 2 unexpected"):
        runner(config, tmp_path / "f", load_from=headless, resume=True).train()


def test_another_variant_of_the_same_shapes_is_refused(segmentor, tmp_path):
    config, checkpoint = segmentor
    other = {"model.backbone.variant": "metaformer_s12_identity"}
    says = r"iter_2\.pth was trained with the backbone poolformer_s12, and the model here is metaformer_s12_identity"
    with pytest.raises(InputError, match=says):
        runner(config, tmp_path / "a", load_from=str(checkpoint), **other).test()
    with pytest.raises(InputError, match=says):
        runner(config, tmp_path / "b", load_from=str(checkpoint), resume=True, **other).train()
    cfg = {"_delete_": True, "type": "Pretrained", "checkpoint": str(checkpoint), "prefix": "backbone."}
    with pytest.raises(InputError, match=says):
        runner(config, tmp_path / "c", **other, **{"model.backbone.init_cfg": cfg}).train()


def test_test_time_augmentation_on_several_devices_takes_the_checkpoint(segmentor, tmp_path):
    config, checkpoint = segmentor
    augmented = Config.fromfile(config)
    augmented.merge_from_dict({"work_dir": str(tmp_path), "load_from": str(checkpoint)})
    augmented.tta_pipeline[1].transforms[0] = [{"type": "Resize", "scale": (128, 64), "keep_ratio": True}]
    augmented.test_dataloader.dataset.pipeline = augmented.tta_pipeline
    augmented.model = {**augmented.tta_model, "module": augmented.model}
    forget_runs()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        tested = Runner.from_cfg(augmented)
        alone = tested.model.module
        tested.model = MMDistributedDataParallel(tested.model)
        assert tested.test()["mIoU"] >= 0
    finally:
        torch.distributed.destroy_process_group()
    weights = torch.load(checkpoint, weights_only=False)["state_dict"]
    assert all(torch.equal(tensor, weights[name]) for name, tensor in alone.state_dict().items())


@pytest.mark.parametrize("lost", ["optimizer", "message_hub", "meta"])
def test_a_run_resumes_only_from_the_checkpoint_of_a_run(segmentor, tmp_path, lost):
    config, checkpoint = segmentor
    published = torch.load(checkpoint, weights_only=False)
    del published[lost]
    torch.save(published, tmp_path / "published.pth")
    with pytest.raises(InputError, match=rf"published\.pth has no {lost}, so that no run can be resumed from it"):
        runner(config, tmp_path / "run", load_from=str(tmp_path / "published.pth"), resume=True).train()


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
model["decode_head"]["num_classes"] = 5
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
    before = torch.load(checkpoint, weights_only=False)["state_dict"]
    assert "2 of another shape (decode_head.conv_seg.bias, decode_head.conv_seg.weight)" in logged[0]
    for name, parameter in tuned.model.named_parameters():
        if "conv_seg" not in name:
            assert torch.equal(parameter, before[name]), name


def test_the_authors_segmentors_are_read(segmentor, tmp_path):
    """Under the official code's names of the backbone and its level norms: the same logits."""
    config, checkpoint = segmentor
    content = torch.load(checkpoint, weights_only=False)
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


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_what_was_checked_is_what_is_loaded(segmentor, tmp_path, key):
    config, checkpoint = segmentor
    weights = torch.load(checkpoint, weights_only=False)["state_dict"]
    torch.save({key: weights}, tmp_path / "weights.pth")
    source = {"load_from": str(tmp_path / "weights.pth")}
    still = {"optim_wrapper.optimizer.lr": 0.0, "train_cfg.max_iters": 1}
    tested, tuned = runner(config, tmp_path / "a", **source), runner(config, tmp_path / "b", **source, **still)
    tested.test()
    tuned.train()
    for run in (tested, tuned):
        for name, parameter in run.model.named_parameters():
            assert torch.equal(parameter, weights[name]), name


def test_training_stops_at_a_loss_that_is_not_finite(segmentor, tmp_path):
    config, _ = segmentor
    diverging = runner(config, tmp_path / "nan")
    diverging.optim_wrapper["optimizer"]["lr"] = 1e30
    with pytest.raises(InputError, match=r"the loss is \S+ at iteration \d: lower the learning rate"):
        diverging.train()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model.backbone.dims": [8, 16, 16, 16]}, "model.neck.in_channels is [8, 16, 24, 32], but the levels of the"),
        ({"model.decode_head.num_classes": 7}, "model.decode_head.num_classes is 7, but the data set has 3: give"),
        ({"model.decode_head.ignore_index": 0}, "model.decode_head.ignore_index is 0, but the data set has 255: give"),
        ({"train_dataloader.dataset.ignore_index": 0}, "data_preprocessor.seg_pad_val is 255, but the data set has 0"),
        ({"val_evaluator.ignore_index": 0}, "val_evaluator.ignore_index is 0, but val_dataloader ignores 255: give"),
    ],
)
def test_levels_classes_and_ignored_labels_are_the_same_everywhere(segmentor, tmp_path, changes, says):
    with pytest.raises(InputError, match=re.escape(says)):
        runner(segmentor[0], tmp_path / "run", **changes).train()


def test_heads_with_classes_of_their_own_are_left_alone():
    """Those of an RPN and of a hybrid task cascade, whose semantic head predicts COCO's stuff as well."""
    roi_head = nn.ModuleDict({"semantic_head": nn.Identity(), "bbox_head": nn.Identity()})
    model = nn.ModuleDict({"rpn_head": nn.Identity(), "roi_head": roi_head})
    model["rpn_head"].num_classes, roi_head["semantic_head"].num_classes, roi_head["bbox_head"].num_classes = 1, 183, 2
    one, two = (SimpleNamespace(metainfo={"classes": classes}) for classes in (("a",), ("a", "b")))
    check_heads(model, two)
    with pytest.raises(InputError, match=r"model\.roi_head\.bbox_head\.num_classes is 2, but the data set has 1"):
        check_heads(model, one)
    roi_head["bbox_head"] = nn.ModuleList([nn.Identity()])  # as of Cascade R-CNN
    roi_head["bbox_head"][0].num_classes = 80
    with pytest.raises(InputError, match=r"model\.roi_head\.bbox_head\.0\.num_classes is 80"):
        check_heads(model, two)


REORDERED, RENAMED = ("house", "ground", "sky"), ("sky", "ground", "hut")


def with_classes(classes: tuple[str, ...] | str, *splits: str) -> dict[str, tuple[str, ...] | str]:
    return {f"{split}_dataloader.dataset.metainfo.classes": classes for split in splits}


def test_classes_of_the_checkpoint_must_be_those_of_the_data(segmentor, tmp_path, monkeypatch):
    config, checkpoint = segmentor
    source, other = {"load_from": str(checkpoint)}, with_classes(REORDERED, "train", "val", "test")
    says = r"iter_2\.pth was trained on other classes than the config has: class"
    with pytest.raises(InputError, match=f"{says} 2 is 'hut' of 3 here and 'house' of 3 there"):
        runner(config, tmp_path / "a", **source, **with_classes(RENAMED, "test")).test()
    with pytest.raises(InputError, match=f"{says} 0 is 'house' of 3 here and 'sky' of 3 there"):
        runner(config, tmp_path / "b", **source, **other, resume=True).train()
    # To fine-tune on other classes is what they ask for; the log says that the head is not new.
    logged = []
    monkeypatch.setattr(metaformer.mm.hooks, "print_log", lambda message, **_: logged.append(message))
    runner(config, tmp_path / "c", **source, **other, **{"train_cfg.max_iters": 1}).train()
    assert "the heads start from weights for other classes" in logged[0]
    assert "PolyLR of param_scheduler ends after 40000 iterations, training after 1: set its end" in logged
    # A picture is drawn with the names that the weights were trained on.
    own = Config.fromfile(config)
    own.merge_from_dict(other)
    own.dump(tmp_path / "other.py")
    assert load_model(str(tmp_path / "other.py"), str(checkpoint), "cpu").dataset_meta["classes"] == SCENES


def test_a_schedule_that_ends_before_the_training(segmentor, tmp_path, monkeypatch):
    config, checkpoint = segmentor
    logged = []
    monkeypatch.setattr(metaformer.mm.hooks, "print_log", lambda message, **_: logged.append(message))
    decay = {"type": "PolyLR", "power": 0.9, "eta_min": 0.0, "begin": 0, "end": 2, "by_epoch": False}
    warm_up = {"type": "LinearLR", "start_factor": 0.1, "begin": 0, "end": 2, "by_epoch": False}
    with pytest.raises(
        InputError, match=r"PolyLR .* ends after 2 iterations, training after 4, and .* is 0 in between"
    ):
        runner(config, tmp_path / "a", param_scheduler=[warm_up, decay]).train()
    logged.clear()
    runner(config, tmp_path / "b", param_scheduler=[{**decay, "eta_min": 1e-5}, warm_up]).train()
    assert "PolyLR of param_scheduler ends after 2 iterations, training after 4, and the learning rate is" in logged[0]
    logged.clear()
    whole, for_four = [warm_up, {**decay, "begin": 2, "end": 4}], {"auto_scale_lr.base_batch_size": 4}
    runner(config, tmp_path / "c", param_scheduler=whole, **for_four).train()
    assert not [message for message in logged if "param_scheduler" in message or "learning rate" in message]
    content = torch.load(checkpoint, weights_only=False)
    content["param_schedulers"][0]["end"] = 2
    torch.save(content, tmp_path / "ended.pth")
    with pytest.raises(InputError, match="is 0 in between: a resumed run keeps the schedule of its checkpoint"):
        runner(config, tmp_path / "d", load_from=str(tmp_path / "ended.pth"), resume=True).train()


def test_records_are_of_this_start(segmentor, tmp_path):
    config, checkpoint = segmentor
    content = torch.load(checkpoint, weights_only=False)
    content["message_hub"]["log_scalars"]["train/time"]._log_history[:] = 1e6  # seconds, on other hardware
    torch.save(content, tmp_path / "slow.pth")
    resumed = runner(config, tmp_path / "resumed", load_from=str(tmp_path / "slow.pth"), resume=True)
    resumed.train()
    (path,) = (tmp_path / "resumed").glob("*/training.json")
    record = json.loads(path.read_text())
    assert record["images_per_s"] > 1e-2
    assert (record["settings"]["iterations"], record["settings"]["epochs"]) == (4, None)
    # What is tested now is not the checkpoint that the run began with. A config may hold classes, which JSON cannot.
    resumed.cfg.test_dataloader.dataset.pipeline[0]["type"] = LoadImageFromFile
    resumed.test()
    (record,) = (tmp_path / "resumed").glob("*/result.json")
    assert json.loads(record.read_text())["checkpoint"] is None
    over = runner(config, tmp_path / "over", load_from=str(tmp_path / "resumed/iter_4.pth"), resume=True)
    over.train()
    assert not list((tmp_path / "over").glob("*/training.json"))


@pytest.mark.parametrize(("split", "classes"), [("val", REORDERED), ("test", RENAMED), ("val", ("sky", "ground"))])
def test_classes_of_all_data_must_be_the_same(segmentor, tmp_path, split, classes):
    config, _ = segmentor
    with pytest.raises(InputError, match=f"{split}_dataloader has other classes than train_dataloader: class"):
        runner(config, tmp_path / "run", **with_classes(classes, split)).train()


def test_a_single_class_without_its_comma(tmp_path):
    data = draw_coco(tmp_path / "data", classes=("RBC", "WBC"))
    edit(data / "annotations/train.json", lambda c: c.update(categories=c["categories"][:1]))
    edit(data / "annotations/train.json", lambda c: [a.update(category_id=1) for a in c["annotations"]])
    config = Config.fromfile(detection_config(tmp_path / "tiny.py", data))
    config.merge_from_dict(with_classes("RBC", "train"))
    init_default_scope("mmdet")
    with pytest.raises(InputError, match=r"other classes than the 3 of metainfo.*=dict\(classes=\('RBC',\)\)"):
        DATASETS.build(config.train_dataloader.dataset)


@pytest.mark.parametrize("classes", [("sky",), "sky"])
def test_a_segmentor_of_a_single_class(tmp_path, classes):
    config = Config.fromfile(segmentation_config(tmp_path / "tiny.py", tmp_path))
    config.merge_from_dict(with_classes(classes, "train"))
    with pytest.raises(InputError, match=r"CheckedSegDataset has the classes \('sky',\): name two or more"):
        DATASETS.build({**config.train_dataloader.dataset, "lazy_init": True})


def test_crops_of_another_size_than_the_batch_is_padded_to(tmp_path):
    config = segmentation_config(tmp_path / "tiny.py", draw_scenes(tmp_path / "data"))
    with pytest.raises(InputError, match=r"data_preprocessor.size is \(512, 512\), but .* crops of \(64, 64\): give"):
        runner(config, tmp_path / "run", **{"model.data_preprocessor.size": (512, 512)}).train()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"val_evaluator.ann_file": "train.json"}, r"val_evaluator\.ann_file is .*train\.json, but .*val\.json: give"),
        (
            {"val_evaluator.ann_file": "none.json"},
            r"there is no annotation file none\.json: give each evaluator",
        ),
        # mmdet would count the objects of the other pictures as missed.
        ({"val_dataloader.dataset.indices": 2}, r"val_evaluator reads all pictures of .*val\.json, and .* its indices"),
    ],
)
def test_an_evaluator_of_other_data_is_refused(tmp_path, monkeypatch, changes, says):
    """Also beside hooks of one's own."""
    data = draw_coco(tmp_path / "data")
    config = detection_config(tmp_path / "tiny.py", data, base="retinanet")
    monkeypatch.chdir(data / "annotations")
    with pytest.raises(InputError, match=says):
        runner(config, tmp_path / "run", **changes, custom_hooks=[{"type": "EMAHook"}]).train()


@pytest.mark.parametrize("step", ["train", "test"])
def test_masks_that_only_the_evaluation_needs(tmp_path, step):
    data = draw_coco(tmp_path / "data")
    edit(data / "annotations/val.json", lambda c: [a.pop("segmentation") for a in c["annotations"]])
    config = detection_config(tmp_path / "tiny.py", data)
    split = {"train": "val", "test": "test"}[step]
    with pytest.raises(InputError, match=f"{split}_dataloader has boxes without a mask .* in 4 of 4 pictures"):
        getattr(runner(config, tmp_path / "run"), step)()


def test_the_log_warns_of_another_batch_and_of_other_labels(segmentor, tmp_path, monkeypatch):
    config, _ = segmentor
    logged = []
    monkeypatch.setattr(metaformer.mm.hooks, "print_log", lambda message, **_: logged.append(message))
    accumulated, short = {"optim_wrapper.accumulative_counts": 4}, {"train_cfg.max_iters": 1}
    with pytest.raises(InputError, match=r"auto_scale_lr ignores accumulative_counts=4 of optim_wrapper: scale lr"):
        runner(config, tmp_path / "a", **accumulated, **{"auto_scale_lr.enable": True}).train()
    shifted = {"test_dataloader.dataset.reduce_zero_label": False}
    runner(config, tmp_path / "b", **accumulated, **short, **shifted).train()
    assert "the base has a learning rate for 32 pictures and a step takes 16: see auto_scale_lr.enable" in logged
    assert "only one of train_dataloader and test_dataloader has reduce_zero_label=True" in logged


def test_a_config_that_replaces_our_imports_still_reads_checkpoints_safely(segmentor, tmp_path, monkeypatch):
    config, checkpoint = segmentor
    monkeypatch.setattr(CheckpointLoader, "_schemes", {"": load_from_local})  # as mmengine has it
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.delitem(sys.modules, "metaformer.mm.patch_mmengine")
    (tmp_path / "own.py").write_text(
        f"_base_ = {str(config)!r}\ncustom_imports = dict(imports=['metaformer.mm.segmentation'])\n"
    )
    assert runner(tmp_path / "own.py", tmp_path / "run", load_from=str(checkpoint)).test()["mIoU"] >= 0


def test_init_cfg_over_a_base_that_has_none(tmp_path):
    config = segmentation_config(tmp_path / "base.py", tmp_path)
    (tmp_path / "own.py").write_text(
        f"_base_ = {str(config)!r}\n"
        'model = dict(backbone=dict(init_cfg=dict(_delete_=True, type="Pretrained", checkpoint="FILE")))\n'
    )
    assert Config.fromfile(tmp_path / "own.py").model.backbone.init_cfg == {"type": "Pretrained", "checkpoint": "FILE"}


def test_more_classes_than_coco_has_colours_are_drawn(tmp_path):
    classes = tuple(f"class {number}" for number in range(81))
    heads = f"for head in ('bbox_head', 'mask_head'):\n    model['roi_head'][head]['num_classes'] = {len(classes)}\n"
    more = f"{heads}test_dataloader['dataset']['metainfo'] = dict(classes={classes})"
    config = detection_config(tmp_path / "many.py", tmp_path, more=more)
    weights = build_model(read_config(str(config), ["mmdet"])).state_dict()
    torch.save({"state_dict": weights}, tmp_path / "many.pth")
    model = load_model(str(config), str(tmp_path / "many.pth"), "cpu")
    assert model.dataset_meta["classes"] == classes
    visualizer = VISUALIZERS.build({**model.cfg.visualizer, "vis_backends": None})
    visualizer.dataset_meta = model.dataset_meta
    found = InstanceData(bboxes=torch.tensor([[1.0, 2, 30, 40]]), labels=torch.tensor([80]), scores=torch.ones(1))
    sample, drawn = DetDataSample(pred_instances=found), tmp_path / "drawn.png"
    visualizer.add_datasample("x", np.zeros((64, 64, 3), np.uint8), sample, draw_gt=False, out_file=str(drawn))
    assert np.asarray(Image.open(drawn)).any()


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def corners(annotation: dict) -> list[int]:
    x, y, width, height = annotation["bbox"]
    return [x, y, x + width, y + height]


def oblong() -> dict:
    """A run-length encoded mask of a picture of 84 x 64 pixels with width and height exchanged."""
    mask = pycocotools.mask.encode(np.ones((84, 64), np.uint8, order="F"))
    return {**mask, "counts": mask["counts"].decode()}


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda d: (d / "train/003.jpg").unlink(), r"train.json names files that are not there \(1\), first .*003.jpg"),
        (lambda d: [p.unlink() for p in (d / "train").iterdir()], r"names files that are not there \(8\), first .*jpg"),
        (lambda d: (d / "annotations/train.json").unlink(), r"there is no annotation file .*cocodataset.org"),
        (lambda d: (d / "annotations/train.json").write_text('{"images": [{"id'), "not an annotation file"),
        (
            lambda d: (d / "annotations/train.json").write_text('{"images": []}'),
            "not an annotation file|has other classes",
        ),
        (lambda d: edit(d / "annotations/train.json", lambda c: c.update(annotations=[])), "no picture with a box"),
        (lambda d: edit(d / "annotations/train.json", lambda c: c.update(images=[])), "no picture with a box"),
        (
            lambda d: edit(d / "annotations/train.json", lambda c: c["categories"][1].update(name="cat")),
            r"has other classes than the 2 of metainfo, .* use metainfo=dict\(classes=\('square', 'cat'\)\)",
        ),
        (
            lambda d: edit(d / "annotations/train.json", lambda c: c["categories"].append({"id": 9, "name": "disc"})),
            r"has other classes than the 2 .* use metainfo=dict\(classes=\('square', 'disc', 'disc'\)\)",
        ),
        (
            lambda d: edit(d / "annotations/train.json", lambda c: c["categories"].reverse()),
            r"train.json has .* in another order, .* use metainfo=dict\(classes=\('disc', 'square'\)\)",
        ),
        (
            lambda d: edit(d / "annotations/train.json", lambda c: c["images"][1].update(width=42)),
            r"width\) of .*001.jpg is \(64, 84\), but .*train.json has \(64, 42\): give both the same",
        ),
        (lambda d: edit(d / "annotations/train.json", lambda c: c["images"][1].update(id=1)), "two pictures with the"),
        *(
            (
                lambda d, change=change: edit(d / "annotations/train.json", lambda c: change(c["annotations"][2])),
                rf"annotation {number} of .*train.json needs a listed category_id, an iscrowd .* an integer id above 0",
            )
            for number, change in (
                (3, lambda box: box.update(category_id=2)),
                (3, lambda box: box.pop("iscrowd")),
                (0, lambda box: box.update(id=0)),
                ("a3", lambda box: box.update(id="a3")),
                (3, lambda box: box.update(iscrowd="0")),
                (3, lambda box: box["bbox"].pop()),
            )
        ),
        (
            lambda d: edit(
                d / "annotations/train.json", lambda c: [a.update(bbox=corners(a)) for a in c["annotations"]]
            ),
            r"of the 16 boxes of .*train.json, [1-9]\d* reach beyond their pictures, .* and 0 have",
        ),
        *(
            (
                lambda d, change=change: edit(
                    d / "annotations/train.json", lambda c: [change(a) for a in c["annotations"]]
                ),
                "of the 16 boxes .* 0 reach .* and 16 have no area or a side below one pixel, as if",
            )
            for change in (
                lambda box: box.update(area=0),
                lambda box: box.update(bbox=[side / 100 for side in box["bbox"]]),
            )
        ),
        (
            lambda d: edit(d / "annotations/train.json", lambda c: c["annotations"][2].update(segmentation=oblong())),
            r"mask of annotation 3 of .*train.json is \[84, 64\], but its picture has \[64, 84\]: give",
        ),
        (
            lambda d: edit(
                d / "annotations/train.json", lambda c: [a.pop("segmentation") for a in c["annotations"][:1]]
            ),
            "train.json has boxes without a mask .* in 1 of 8 pictures, first in .*000.jpg: Mask R-CNN needs",
        ),
    ],
)
def test_wrong_detection_data(tmp_path, spoil, says):
    data = draw_coco(tmp_path / "data")
    spoil(data)
    config = Config.fromfile(detection_config(tmp_path / "tiny.py", data))
    init_default_scope("mmdet")
    with pytest.raises(InputError, match=says):
        list(Runner.build_dataloader(config.train_dataloader))


def test_boxes_alone_are_enough_for_retinanet(tmp_path):
    """Also if one reaches beyond its picture by some pixels."""
    data = draw_coco(tmp_path / "data")
    edit(data / "annotations/train.json", lambda c: [a.pop("segmentation") for a in c["annotations"]])
    edit(data / "annotations/train.json", lambda c: c["annotations"][0].update(bbox=[60, 48, 24, 20]))
    config = Config.fromfile(detection_config(tmp_path / "tiny.py", data, base="retinanet"))
    init_default_scope("mmdet")
    assert len(list(Runner.build_dataloader(config.train_dataloader))) == 4


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda d: [p.unlink() for p in (d / "annotations/training").iterdir()], r"not there \(8\), first .*png"),
        (lambda d: (d / "annotations/training/002.png").unlink(), r"not there \(1\), first .*002.png"),
        (lambda d: [p.unlink() for p in (d / "images/training").iterdir()], r"there is no picture \*.jpg in"),
        (lambda d: (d / "images").rename(d / "pictures"), "there is no picture .*ADEChallengeData2016.zip"),
        *(
            (
                lambda d, suffix=suffix: (path := d / "images/training/001.jpg").rename(path.with_suffix(suffix)),
                rf"001\{suffix} would be left out, because its name does not end in img_suffix='.jpg': give all",
            )
            for suffix in (".JPG", ".png")
        ),
        (lambda d: (d / "images/training/001.jpg").write_text("no picture"), r"cannot use .*001.jpg"),
        (
            lambda d: (d / "annotations/training/001.png").write_text("no picture"),
            r"cannot use .*001.jpg: .* cannot identify image file .*001.png",
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
        (
            lambda d: Image.fromarray(np.ones((140, 180), np.uint8)).save(d / "annotations/training/001.png"),
            r"width\) of .*001.jpg is \(71, 90\), but .*001.png has \(140, 180\): give both the same",
        ),
    ],
)
def test_wrong_segmentation_data(tmp_path, spoil, says):
    data = draw_scenes(tmp_path / "data")
    spoil(data)
    config = Config.fromfile(segmentation_config(tmp_path / "tiny.py", data))
    config.train_dataloader.sampler = {"type": "DefaultSampler", "shuffle": False}
    init_default_scope("mmseg")
    with pytest.raises(InputError) as caught:
        list(Runner.build_dataloader(config.train_dataloader))
    sentence = as_raised(caught.value)
    assert re.search(says, sentence)
    assert "\n" not in sentence


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"metainfo": {"CLASSES": SCENES}},
            r"CheckedSegDataset has the classes \(\): name two or more with metainfo=dict\(classes=",
        ),
        # mmseg would take the label 0 for a wall, which is the first of ADE20K's classes, and ignore the others.
        (
            {"type": "CheckedADE20KDataset", "metainfo": {"classes": ("floor", "wall", "door")}},
            r"CheckedADE20KDataset has other classes \(class 0 is 'wall' of 150 here and 'floor' of 3 there\): use",
        ),
        ({"ann_file": "splits/none.txt"}, r"there is no list of pictures .*splits/none\.txt"),
    ],
)
def test_segmentation_data_of_another_layout(tmp_path, changes, says):
    config = Config.fromfile(segmentation_config(tmp_path / "tiny.py", draw_scenes(tmp_path / "data")))
    init_default_scope("mmseg")
    with pytest.raises(InputError, match=says):
        DATASETS.build({**config.train_dataloader.dataset, **changes})


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_pictures_are_mixed(tmp_path, task):
    """The inner data set of the toolboxes' mosaic does not pack its samples."""
    if task == "detection":
        config = detection_config(tmp_path / "tiny.py", draw_coco(tmp_path / "data"), base="retinanet")
        mosaic, pack, scope = "Mosaic", "PackDetInputs", "mmdet"
    else:
        config = segmentation_config(tmp_path / "tiny.py", draw_scenes(tmp_path / "data"))
        mosaic, pack, scope = "RandomMosaic", "PackSegInputs", "mmseg"
    init_default_scope(scope)
    dataset = Config.fromfile(config).train_dataloader.dataset
    dataset.pipeline = dataset.pipeline[:2]
    steps = [{"type": mosaic, "prob": 1.0, "img_scale": (64, 64)}, {"type": pack}]
    mixed = DATASETS.build({"type": "MultiImageMixDataset", "dataset": dataset, "pipeline": steps})
    assert mixed[0]["inputs"].shape == (3, 128, 128)


def test_a_loader_process_names_the_file_as_well(tmp_path):
    data = draw_scenes(tmp_path / "data")
    (data / "images/training/001.jpg").write_text("no picture")
    config = Config.fromfile(segmentation_config(tmp_path / "tiny.py", data))
    config.train_dataloader.update(num_workers=1, sampler={"type": "DefaultSampler", "shuffle": False})
    init_default_scope("mmseg")
    with pytest.raises(InputError) as caught:
        list(Runner.build_dataloader(config.train_dataloader))
    assert re.fullmatch(r"cannot use \S*001.jpg: .*", as_raised(caught.value))


def test_masks_of_0_and_255_have_one_class(tmp_path):
    data = draw_scenes(tmp_path / "data")
    config = Config.fromfile(segmentation_config(tmp_path / "tiny.py", data))
    config.train_dataloader.dataset.update(reduce_zero_label=False, metainfo={"classes": ("background", "house")})
    init_default_scope("mmseg")
    maps = sorted((data / "annotations/training").iterdir())
    for path in maps:
        Image.fromarray(np.where(np.asarray(Image.open(path)) == 3, 255, 0).astype(np.uint8)).save(path)
    with pytest.raises(InputError, match=r"annotations/training have the labels 0 and 255 alone, and the latter is"):
        DATASETS.build(config.train_dataloader.dataset)
    Image.fromarray(np.where(np.asarray(Image.open(maps[0])) == 255, 1, 0).astype(np.uint8)).save(maps[0])
    assert len(DATASETS.build(config.train_dataloader.dataset)) == len(maps)
