"""The backbone in mmdet and mmseg: against other implementations of its features, in every config, through mim."""

import argparse
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest import mock

import mmdet
import mmseg
import numpy as np
import pytest
import timm.models.metaformer as timm_metaformer
import torch
from accelerate import init_empty_weights
from mmdet.apis import DetInferencer
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.optim import OptimWrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import CheckpointLoader
from mmengine.structures import InstanceData, PixelData
from mmseg.structures import SegDataSample
from PIL import Image
from torch import nn

import metaformer.mm.detection
import metaformer.mm.patch_mmengine
import metaformer.mm.segmentation
from conftest import ROOT
from drawn import draw_coco, draw_scenes, forget_runs
from metaformer import MLN, ChannelLayerNorm, InputError, records
from metaformer.mm import MetaFormerBackbone
from metaformer.mm.hooks import mim_command
from oracles import OFFICIAL_NAMES, TIMM_NAMES, renamed, save_run

# Parameters in millions as Tables 3 and 4 print them, by config. In Table 3 the ResNets' are those that are trained,
# the stem and the first stage being frozen.
TABLE_3 = {
    "retinanet_r18": 21.3,
    "retinanet_poolformer-s12": 21.7,
    "retinanet_r50": 37.7,
    "retinanet_poolformer-s24": 31.1,
    "retinanet_r101": 56.7,
    "retinanet_poolformer-s36": 40.6,
    "mask-rcnn_r18": 31.2,
    "mask-rcnn_poolformer-s12": 31.6,
    "mask-rcnn_r50": 44.2,
    "mask-rcnn_poolformer-s24": 41.0,
    "mask-rcnn_r101": 63.2,
    "mask-rcnn_poolformer-s36": 50.5,
}
TABLE_4 = {
    "fpn_r18": 15.5,
    "fpn_pvt-tiny": 17.0,
    "fpn_poolformer-s12": 15.7,
    "fpn_r50": 28.5,
    "fpn_pvt-small": 28.2,
    "fpn_poolformer-s24": 23.2,
    "fpn_r101": 47.5,
    "fpn_x101-32x4d": 47.1,
    "fpn_pvt-medium": 48.0,
    "fpn_poolformer-s36": 34.6,
    "fpn_pvt-large": 65.1,
    "fpn_poolformer-m36": 59.8,
    "fpn_x101-64x4d": 86.4,
    "fpn_poolformer-m48": 77.1,
}
COUNTED = {"fpn_poolformer-s24": 25.1, "fpn_r18": 15.4}
"""Where the count differs from the print: S24 is a misprint of the paper, R18 is printed so in the PVT paper, too."""
README = ROOT / "detection/README.md"
CONFIGS = {
    **{row: ROOT / f"configs/detection/{row}_fpn_8xb2-1x_coco.py" for row in TABLE_3},
    **{row: ROOT / f"configs/segmentation/{row}_8xb4-40k_ade20k-512x512.py" for row in TABLE_4},
}


def backbone(**arguments) -> MetaFormerBackbone:
    return MODELS.build({"type": "MetaFormer", "variant": "poolformer_s12", **arguments})


def randomised(module: nn.Module) -> nn.Module:
    """LayerScale and norms large enough to matter."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "layer_scale" in name or "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return module


@pytest.fixture
def official(tmp_path):
    """An ImageNet classifier as the official release names it: (file, weights under our names)."""
    classifier = randomised(metaformer.variants.entry_point("poolformer_s12")()).state_dict()
    path = tmp_path / "poolformer_s12.pth.tar"
    torch.save(renamed(classifier, OFFICIAL_NAMES), path)
    return path, classifier


# Backbone


@pytest.mark.parametrize("out_indices", [(0, 1, 2, 3), (1, 2, 3), (0, 2)])
def test_features_are_timms_with_a_norm_per_level(out_indices):
    ours = randomised(backbone(out_indices=out_indices)).double().eval()
    theirs = timm_metaformer.poolformer_s12(features_only=True, out_indices=out_indices).double().eval()
    weights = {name.replace("stages.", "stages_"): t for name, t in renamed(ours.state_dict(), TIMM_NAMES).items()}
    norms = {name: weights.pop(name) for name in list(weights) if name.startswith("out_norms")}
    theirs.load_state_dict(weights)
    images = torch.randn(2, 3, 75, 96, dtype=torch.float64)
    features = ours(images)
    assert len(features) == len(out_indices)
    assert len(norms) == 2 * len(out_indices)
    for i, level, expected in zip(out_indices, features, theirs(images), strict=True):
        gamma, beta = norms[f"out_norms.{i}.weight"], norms[f"out_norms.{i}.bias"]
        torch.testing.assert_close(level, nn.functional.group_norm(expected, 1, gamma, beta), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "norm_layers",
    [
        partial(nn.GroupNorm, 1),
        partial(MLN, eps=1e-3),
        (MLN, ChannelLayerNorm, nn.BatchNorm2d, partial(MLN, eps=1e-3)),
    ],
)
def test_each_level_has_the_norm_of_its_stage(norm_layers):
    model = backbone(norm_layers=norm_layers)
    for i, norm in model.out_norms.items():
        assert str(norm) == str(model.stages[int(i)].blocks[0].norm1)


def test_freezing_keeps_stem_and_stages_as_they_are():
    model = backbone(frozen_stages=2, drop_path_rate=0.5).train()
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {n for n, _ in model.named_parameters() if n.startswith(("stem.", "stages.0.", "stages.1."))}
    assert not any(module.training for part in (model.stem, *model.stages[:2]) for module in part.modules())
    assert model.stages[2].training
    sum(level.sum() for level in model(torch.randn(1, 3, 64, 64))).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_norm_eval_keeps_running_statistics():
    images = torch.randn(2, 3, 64, 64)
    for norm_eval in (False, True):
        model = backbone(norm_layers=nn.BatchNorm2d, norm_eval=norm_eval).train()
        before = model.stages[1].blocks[0].norm1.running_mean.clone()
        model(images)
        assert torch.equal(model.stages[1].blocks[0].norm1.running_mean, before) == norm_eval


def test_recomputing_blocks_gives_the_same_gradients():
    plain, recomputing = randomised(backbone()), randomised(backbone(with_cp=True))
    recomputing.load_state_dict(plain.state_dict())
    images = torch.randn(1, 3, 64, 64)
    for model in (plain, recomputing):
        sum((level**2).mean() for level in model(images)).backward()
    for ours, theirs in zip(recomputing.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_drop_path_is_off_unless_asked_for():
    assert not any("DropPath" in type(module).__name__ for module in backbone().modules())
    rates = [m.drop_prob for m in backbone(drop_path_rate=0.1).modules() if "DropPath" in type(m).__name__]
    assert rates == pytest.approx([0.1 * i / 11 for i in range(1, 12)])


def test_a_classifier_takes_the_backbone_of_a_detector(tmp_path):
    detector = nn.ModuleDict({"backbone": randomised(backbone()), "neck": nn.Conv2d(512, 256, 1)})
    history = HistoryBuffer(np.ones(3), np.ones(3))
    content = {"state_dict": detector.state_dict(), "meta": {}, "message_hub": {"loss": history}}
    torch.save(content, tmp_path / "epoch_12.pth")
    classifier = metaformer.variants.entry_point("poolformer_s12")(num_classes=3)
    head = classifier.head.weight.clone()
    with pytest.raises(InputError, match="holds a backbone without a classifier: use replace_head=true"):
        metaformer.load_weights(classifier, tmp_path / "epoch_12.pth")
    assert metaformer.load_weights(classifier, tmp_path / "epoch_12.pth", replace_head=True) == "toolbox"
    images = torch.randn(1, 3, 64, 64)
    levels = detector["backbone"].forward_intermediates(images, intermediates_only=True)
    torch.testing.assert_close(classifier.forward_features(images), levels[-1])
    assert torch.equal(classifier.head.weight, head)


def test_readme_s_mixer_of_ones_own():
    """The snippet of detection/README.md, run as it stands, in place of the backbone of a config."""
    snippet = next(s for s in re.findall(r"```python\n(.*?)```", README.read_text(), re.S) if "register_module" in s)
    exec(snippet, {})
    model = MODELS.build({"type": "ShiftFormer", "variant": "poolformer_s12", "out_indices": (1, 2, 3)})
    assert "ShiftMixer" in str(model)
    assert [level.shape[1] for level in model(torch.randn(1, 3, 64, 64))] == [128, 320, 512]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"variant": "poolformer_s21"}, "there is no variant 'poolformer_s21' (did you mean 'poolformer_"),
        ({"out_indices": (0, 4)}, "out_indices=(0, 4): give levels of poolformer_s12 from 0 to 3 in ascending order"),
        ({"out_indices": (3, 1)}, "out_indices=(3, 1)"),
        ({"out_indices": ()}, "out_indices=()"),
        ({"out_indices": 3}, "out_indices=3: give levels of poolformer_s12 from 0 to 3"),
        ({"frozen_stages": 5}, "frozen_stages=5"),
        ({"frozen_stage": 3}, "no argument of the backbone 'frozen_stage' (did you mean 'frozen_stages'?)"),
        ({"num_classes": 3}, "no argument of the backbone 'num_classes'"),
        ({"init_cfg": {"type": "Kaiming"}}, "init_cfg"),
        ({"init_cfg": [{"type": "Pretrained", "checkpoint": "x.pth"}]}, "init_cfg of the backbone is [{"),
        ({"init_cfg": {"type": "Pretrained"}}, "checkpoint=..."),
    ],
)
def test_wrong_arguments(arguments, says):
    with pytest.raises(InputError, match=re.escape(says)):
        backbone(**arguments)


# Weights in


@pytest.mark.parametrize("wrap", [lambda w: w, lambda w: {"state_dict": w, "epoch": 3}, lambda w: {"model": w}])
def test_pretrained_takes_official_files(tmp_path, official, wrap):
    path, classifier = official
    torch.save(wrap(torch.load(path)), path)
    model = backbone(init_cfg={"type": "Pretrained", "checkpoint": str(path)})
    model.init_weights()
    for name, tensor in model.state_dict().items():
        if name.startswith("out_norms."):
            assert torch.equal(tensor, torch.full_like(tensor, name.endswith("weight")))
        else:
            assert torch.equal(tensor, classifier[name]), name


def test_pretrained_takes_ours_and_logs_it(tmp_path, official, monkeypatch):
    logged = []
    monkeypatch.setattr(metaformer.mm.backbone, "print_log", lambda message, logger: logged.append(message))
    torch.save({"model": official[1]}, tmp_path / "best.pt")
    model = backbone(out_indices=(0, 1), init_cfg={"type": "Pretrained", "checkpoint": str(tmp_path / "best.pt")})
    model.init_weights()
    assert torch.equal(model.stages[1].downsample.weight, official[1]["stages.1.downsample.weight"])
    assert logged == [
        f"poolformer_s12: loaded 44 of 48 tensors from {tmp_path / 'best.pt'}; new: out_norms.0, out_norms.1; "
        "left out: head, norm, stages.2, stages.3"
    ]


@pytest.mark.parametrize("prefix", ["backbone.", "backbone"])
def test_pretrained_takes_the_backbone_of_a_segmentor(tmp_path, prefix):
    source = randomised(backbone())
    weights = {f"backbone.{name}": tensor for name, tensor in source.state_dict().items()}
    torch.save({"state_dict": {**weights, "decode_head.conv.weight": torch.ones(1)}}, tmp_path / "iter_9.pth")
    cfg = {"type": "Pretrained", "checkpoint": str(tmp_path / "iter_9.pth"), "prefix": prefix}
    model = backbone(out_indices=(1, 2, 3), init_cfg=cfg)
    model.init_weights()
    assert torch.equal(model.out_norms["3"].weight, source.out_norms["3"].weight)
    assert torch.equal(model.stem.weight, source.stem.weight)


def test_a_classifiers_norm_is_no_level_with_a_prefix_either(tmp_path, official):
    """mmpretrain has the backbone of a classifier and the norm before its head under the same prefix as a detector."""
    torch.save({"state_dict": metaformer.convert(official[1], "mmpretrain")}, tmp_path / "mmpretrain.pth")
    for prefix in ({}, {"prefix": "backbone."}):
        cfg = {"type": "Pretrained", "checkpoint": str(tmp_path / "mmpretrain.pth"), **prefix}
        model = backbone(init_cfg=cfg)
        model.init_weights()
        assert torch.equal(model.stem.weight, official[1]["stem.weight"])
        assert torch.equal(model.out_norms["3"].weight, torch.ones(512))


@pytest.mark.parametrize("source", ["file:///tmp/x.pt", "hf://a/b", "gs://a/b.pth"])
def test_an_address_that_nothing_can_read_is_refused(source):
    with pytest.raises(InputError, match=f"there is no checkpoint {Path(source)}"):
        CheckpointLoader.load_checkpoint(source)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda path: path.unlink(), "there is no checkpoint"),
        (lambda path: path.write_bytes(path.read_bytes()[:5000]), "is damaged"),
        (lambda path: torch.save({"a": torch.ones(1)}, path), r"1 unexpected \(a\)"),
        (
            lambda path: torch.save({**torch.load(path), "network.0.2.norm1.weight": torch.ones(64)}, path),
            "1 unexpected",
        ),
        (lambda path: torch.save({**torch.load(path), "patch_embed.proj.bias": torch.ones(9)}, path), "another shape"),
    ],
)
def test_pretrained_refuses_what_does_not_fit(official, spoil, says):
    path, _ = official
    spoil(path)
    with pytest.raises(InputError, match=says):
        backbone(init_cfg={"type": "Pretrained", "checkpoint": str(path)}).init_weights()


def test_pretrained_refuses_another_variant(official):
    cfg = {"type": "Pretrained", "checkpoint": str(official[0])}
    with pytest.raises(InputError, match=r"another architecture than the model \(MetaFormerBackbone\): 120 missing"):
        backbone(variant="poolformer_s24", init_cfg=cfg).init_weights()


def test_pretrained_refuses_a_run_of_another_model_of_the_same_shapes(tmp_path, official):
    """Pooling over 5 or 3 positions and the stride of the stem have no weights that would tell."""
    path = tmp_path / "best.pt"
    for run in ({"model": "metaformer_s12_pool5"}, {"model": "poolformer_s12", "model_args": {"stem_stride": 2}}):
        torch.save({"model": official[1], "config": run}, path)
        with pytest.raises(
            InputError, match=r"best.pt was trained as .*, and the model here is poolformer_s12 with \{\}"
        ):
            backbone(init_cfg={"type": "Pretrained", "checkpoint": str(path)}).init_weights()
    backbone(stem_stride=2, init_cfg={"type": "Pretrained", "checkpoint": str(path)}).init_weights()


def test_pretrained_takes_the_moving_average_of_a_run(tmp_path, official):
    average = {name: tensor + 1 for name, tensor in official[1].items()}
    torch.save({"model": official[1], "state_dict_ema": average}, tmp_path / "best.pt")
    model = backbone(init_cfg={"type": "Pretrained", "checkpoint": str(tmp_path / "best.pt")})
    model.init_weights()
    assert torch.equal(model.stem.weight, average["stem.weight"])


def test_download_is_cached_and_a_dead_address_named(tmp_path, official, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    fetched = []
    monkeypatch.setattr(
        "timm.models._hub.download_url_to_file",
        lambda url, path, *_, **__: fetched.append(url) or Path(path).write_bytes(official[0].read_bytes()),
    )
    for _ in range(2):
        checkpoint = CheckpointLoader.load_checkpoint("https://example.org/poolformer_s12.pth.tar")
        assert checkpoint.keys() == torch.load(official[0]).keys()
    assert fetched == ["https://example.org/poolformer_s12.pth.tar"]
    (cached,) = (tmp_path / "hub/checkpoints").rglob("poolformer_s12.pth.tar")
    cached.write_bytes(cached.read_bytes()[:9999])
    with pytest.raises(InputError, match="damaged"):
        CheckpointLoader.load_checkpoint("https://example.org/poolformer_s12.pth.tar")
    CheckpointLoader.load_checkpoint("https://example.org/poolformer_s12.pth.tar")
    assert len(fetched) == 2
    CheckpointLoader.load_checkpoint("https://example.org/another-run/poolformer_s12.pth.tar")
    assert len(fetched) == 3
    monkeypatch.undo()
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "empty"))
    with pytest.raises(InputError, match=r"cannot fetch https://127\.0\.0\.1:9/x\.pth"):
        CheckpointLoader.load_checkpoint("https://127.0.0.1:9/x.pth")


class Intruder:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_checkpoints_cannot_execute_code(tmp_path):
    path = tmp_path / "iter_1.pth"
    target = tmp_path / "executed"
    for payload in (Intruder(os.mkdir, str(target)), Intruder(getattr, dict, "get")):
        torch.save({"state_dict": {}, "message_hub": payload}, path)
        with pytest.raises(InputError, match="could run code"):
            CheckpointLoader.load_checkpoint(str(path))
    torch.save({"state_dict": {}, "meta": {"config": f"import os; os.mkdir({str(target)!r})"}}, path)
    assert "config" not in CheckpointLoader.load_checkpoint(str(path))["meta"]
    assert not target.exists()
    # What mmengine itself pickles is read back.
    history = HistoryBuffer([1.0, 2.0], [1, 1])
    torch.save({"history": history, "best": np.float32(0.5), "seen": np.int64(3), "mean": np.ones(3)}, path)
    loaded = CheckpointLoader.load_checkpoint(str(path))
    assert loaded["history"].mean() == 1.5
    assert loaded["best"] == np.float32(0.5)


# Every config


def test_every_row_of_the_tables_has_its_config():
    there = {path for task in ("detection", "segmentation") for path in (ROOT / "configs" / task).glob("*.py")}
    assert there == set(CONFIGS.values())


def built(row: str, **changes) -> nn.Module:
    """The model of a row, with changes of its backbone."""
    config = Config.fromfile(CONFIGS[row])
    init_default_scope(config.default_scope)
    config.model.backbone.update(init_cfg=None, **changes)
    if row in TABLE_4:
        config.model.data_preprocessor.size = (64, 64)
    if row.startswith("mask-rcnn"):  # 1000 proposals take their time even on a tiny picture
        config.model.train_cfg.rpn_proposal.max_per_img = config.model.test_cfg.rpn.max_per_img = 20
    return MODELS.build(config.model)


@pytest.mark.parametrize("row", CONFIGS)
def test_config_has_the_printed_parameters_and_its_parts_fit(row):
    """Without memory or arithmetic."""
    with init_empty_weights():
        model = built(row)
    with torch.device("meta"):
        model.to("meta")
        counts_all = row in TABLE_4 or "poolformer" in row
        counted = sum(p.numel() for p in model.parameters() if counts_all or p.requires_grad)
        assert round(counted / 1e6, 1) == COUNTED.get(row, {**TABLE_3, **TABLE_4}[row])
        levels = model.neck(model.backbone(torch.zeros(2, 3, 64, 64)))
        if row in TABLE_4:
            assert model.decode_head(levels).shape == (2, 150, 16, 16)
        else:
            head = model.rpn_head if row.startswith("mask-rcnn") else model.bbox_head
            assert len(head(levels)[0]) == 5


@pytest.mark.parametrize(
    "row",
    ["retinanet_poolformer-s12", "retinanet_r18", "mask-rcnn_poolformer-s12", "fpn_poolformer-s12", "fpn_pvt-tiny"],
)
def test_config_trains_and_infers(row):
    """One training step in which every trainable tensor gets its gradient, and one inference."""
    torch.manual_seed(0)
    shallow = {"poolformer": {"depths": [1, 1, 1, 1]}, "pvt": {"num_layers": [1, 1, 1, 1]}, "r18": {}}
    model = built(row, **shallow[row.partition("_")[2].partition("-")[0]])
    inputs = [torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8) for _ in range(2)]
    samples = [detection_sample() if row in TABLE_3 else segmentation_sample() for _ in inputs]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-6)
    model.train()
    data = model.data_preprocessor({"inputs": inputs, "data_samples": samples}, training=True)
    loss, _ = model.parse_losses(model(**data, mode="loss"))
    assert loss.isfinite()
    OptimWrapper(optimizer).backward(loss)
    assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    optimizer.step()

    with torch.no_grad():
        result = model.eval().test_step({"inputs": inputs[:1], "data_samples": samples[:1]})[0]
    if row in TABLE_3:
        assert set(result.pred_instances.keys()) >= {"bboxes", "scores", "labels"}
        assert ("masks" in result.pred_instances) == row.startswith("mask-rcnn")
    else:
        assert result.pred_sem_seg.data.shape == (1, 64, 64)
        assert result.seg_logits.data.shape[0] == 150


def detection_sample() -> DetDataSample:
    size = {"img_shape": (64, 64), "ori_shape": (64, 64), "scale_factor": (1.0, 1.0), "img_id": 0}
    mask = np.zeros((1, 64, 64), dtype=np.uint8)
    mask[0, 10:50, 8:40] = 1
    instances = InstanceData(
        bboxes=torch.tensor([[8.0, 10.0, 40.0, 50.0]]), labels=torch.tensor([3]), masks=BitmapMasks(mask, 64, 64)
    )
    return DetDataSample(
        metainfo=size, gt_instances=instances, ignored_instances=InstanceData(bboxes=torch.zeros(0, 4), labels=[])
    )


def segmentation_sample() -> SegDataSample:
    size = {"img_shape": (64, 64), "ori_shape": (64, 64), "pad_shape": (64, 64), "flip": False}
    return SegDataSample(metainfo=size, gt_sem_seg=PixelData(data=torch.randint(0, 150, (1, 64, 64))))


@pytest.mark.parametrize("path", CONFIGS.values(), ids=CONFIGS)
def test_config_reads_from_top_to_bottom(path):
    """One level of bases; the head of the file names the printed parameters and the commands for this very file."""
    bases = re.search(r"^_base_ = (.*)$", path.read_text(), re.M)[1]
    for base in re.findall(r'"(.*?)"', bases):
        assert "_base_ =" not in (path.parent / base).read_text()
    head = path.read_text().partition("_base_")[0]
    row = next(row for row, config in CONFIGS.items() if config == path)
    assert f"{({**TABLE_3, **TABLE_4})[row]} M parameters" in head
    name = path.relative_to(ROOT)
    assert head.count(f"mim train mm{'det' if row in TABLE_3 else 'segmentation'} {name}") == 1
    assert head.count(f"mim test mm{'det' if row in TABLE_3 else 'segmentation'} {name}") == 1


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_readme_lists_every_config(task):
    text = (ROOT / task / "README.md").read_text()
    for row, path in CONFIGS.items():
        if path.parent.name == task:
            line = re.search(rf"^\| `{path.name}` +\| (\d\S*) M +\|.*$", text, re.M)
            assert line, path.name
            assert float(line[1]) == COUNTED.get(row, {**TABLE_3, **TABLE_4}[row])
            accuracies = re.findall(r"\| (\d+\.\d) +(?=\|)", line[0])
            assert accuracies == re.findall(r"(?:AP|mIoU) (\d+\.\d)", path.read_text().partition("_base_")[0])


# Through mim, with the configs that the READMEs give for data of one's own


def tool(toolbox, name: str, *arguments, folder: Path) -> None:
    """Run a program of a toolbox in this process, as mim does in one of its own."""
    script = Path(toolbox.__file__).parent / f".mim/tools/{name}.py"
    forget_runs()
    with pytest.MonkeyPatch.context() as patch, mock.patch.dict(os.environ):  # the programs set LOCAL_RANK
        patch.chdir(folder)
        patch.setattr(sys, "argv", [str(script), *map(str, arguments)])
        runpy.run_path(str(script), run_name="__main__")


def newest_log(folder: Path) -> str:
    return max(folder.glob("work_dirs/*/*/*.log"), key=lambda path: path.stat().st_mtime).read_text()


def own_config(task: str, folder: Path, smaller: dict[str, str]) -> Path:
    """Copy the configs and save README's config for data of one's own beside them, with other values in some lines."""
    shutil.copytree(ROOT / "configs" / task, folder / "configs" / task)
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / task / "README.md").read_text(), re.S)
    (text,) = (snippet for snippet in snippets if "_base_" in snippet)
    for names, values in smaller.items():
        text, found = re.subn(rf"^{names} = [^#\n]*", f"{names} = {values} ", text, flags=re.M)
        assert found == 1, names
    config = folder / f"configs/{task}/own.py"
    config.write_text(text)
    return config


SCRATCH = ["--cfg-options", "model.backbone.init_cfg=None"]
IN_PROCESS = [
    f"{loader}_dataloader.{setting}"
    for loader in ("train", "val", "test")
    for setting in ("num_workers=0", "persistent_workers=False")
]
SMALL = [*SCRATCH, *IN_PROCESS, "model.backbone.depths=[1,1,1,1]", "default_hooks.logger.interval=1"]
FEW_BOXES = [
    *("model.train_cfg.rpn_proposal.max_per_img=20", "model.test_cfg.rpn.max_per_img=20"),
    "model.train_cfg.rcnn.sampler.num=16",
]


@pytest.fixture(scope="module")
def trained_detector(tmp_path_factory):
    """(folder, log) after one of two epochs."""
    folder = tmp_path_factory.mktemp("detector")
    draw_coco(folder / "data/street", classes=("person", "bicycle"))
    config = own_config("detection", folder, {"size": "(96, 96)", "batch, epochs, iterations": "2, 2, 4"})
    tool(mmdet, "train", config, *SMALL, *FEW_BOXES, "train_cfg.max_epochs=1", folder=folder)
    return folder, newest_log(folder)


@pytest.fixture(scope="module")
def trained_segmentor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("segmentor")
    draw_scenes(folder / "data/rooms", first=0)
    once = ["train_cfg.val_interval=20", "default_hooks.checkpoint.interval=20"]
    config = own_config("segmentation", folder, {"size": "(64, 64)", "batch, iterations": "2, 20"})
    tool(mmseg, "train", config, *SMALL, *once, folder=folder)
    return folder, newest_log(folder)


def values(log: str, name: str) -> list[float]:
    return [float(value) for value in re.findall(rf"\(train\).*?\b{name}: (\S+)", log)]


def result_record(folder: Path) -> dict:
    """The newest record of a test in a work dir."""
    return json.loads(max(folder.glob("*/result.json"), key=lambda path: path.stat().st_mtime).read_text())


def test_a_detector_is_trained_tested_through_mim_and_resumed(trained_detector):
    folder, log = trained_detector
    config, checkpoint = "work_dirs/street/own.py", "work_dirs/street/epoch_1.pth"
    mim = [str(Path(sys.executable).with_name("mim")), "test", "mmdet", config, "--gpus", "0"]
    done = subprocess.run([*mim, "--checkpoint", checkpoint], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    record = result_record(folder / "work_dirs/street")
    # The figures of the record are those of the evaluation at the end of training.
    trained = {name: float(value) for name, value in re.findall(r"(coco/\w+): (-?[\d.]+)", log.rpartition("(val)")[2])}
    assert {name: round(value, 4) for name, value in record["metrics"].items() if name in trained} == trained
    assert {"coco/bbox_mAP", "coco/segm_mAP"} <= trained.keys()
    assert record["command"].startswith(f"mim test mmdet {config} --gpus 0 --checkpoint {checkpoint}")
    assert record["data"]["images"] == 4
    model = record["settings"]["model"]
    assert (model["backbone"]["depths"], model["test_cfg"]["rpn"]["max_per_img"]) == ([1, 1, 1, 1], 20)
    assert record["settings"]["evaluators"] == [{"type": "CheckedCocoMetric", "metric": ["bbox", "segm"]}]
    assert len(record["checkpoint"]["sha256"]) == 64

    targets = records.import_records([folder / "work_dirs/street"], folder / "results")
    detection, training = (json.loads(path.read_text()) for path in sorted(targets))
    assert (detection["kind"], training["kind"]) == ("detection", "training")
    assert detection["metrics"] == record["metrics"]
    assert training["images_per_s"] > 0
    assert (training["devices"], training["settings"]["epochs"], training["data"]["classes"]) == (1, 1, 2)
    assert str(folder) not in "".join(path.read_text() for path in targets)

    tool(mmdet, "train", "configs/detection/own.py", "--resume", *SMALL, *FEW_BOXES, folder=folder)
    resumed = newest_log(folder)
    assert "resumed epoch: 1, iter: 4" in resumed
    assert re.findall(r"Epoch\(train\) +\[(\d)\]\[1/4\]", resumed) == ["2"]
    assert values(log, "loss")[-1] < values(log, "loss")[0]
    # README's schedule: a warm-up of one epoch to 2e-4 for 16 pictures, here 2; after two thirds of the epochs a tenth.
    rates = values(log, "lr") + values(resumed, "lr")
    assert rates[:4] == pytest.approx([2.5e-5 * (0.001 + 0.999 * i / 3) for i in range(4)], rel=1e-3)
    assert rates[4:] == pytest.approx([2.5e-7] * 4, rel=1e-3)


def test_a_segmentor_is_trained_and_tested(trained_segmentor):
    folder, log = trained_segmentor
    # README's schedule: a warm-up to 2e-4 for 32 pictures, here 2, then polynomial decay to 0.
    rates = values(log, "lr")
    assert rates[:2] == pytest.approx([1.25e-8, 1.25e-5])
    assert rates[2:] == pytest.approx([1.25e-5 * (1 - i / 17) ** 0.9 for i in range(18)], rel=1e-3)
    tool(mmseg, "test", "work_dirs/rooms/own.py", "work_dirs/rooms/iter_20.pth", folder=folder)
    record = result_record(folder / "work_dirs/rooms")
    assert round(record["metrics"]["mIoU"], 2) == float(re.findall(r"mIoU: ([\d.]+)", log)[-1])
    assert record["metrics"]["mIoU"] > 40  # the three classes by chance: less than 20
    assert (record["kind"], record["data"]["classes"]) == ("segmentation", 3)


def test_test_time_augmentation_flips_predictions_back(trained_segmentor, tmp_path):
    """Pictures and truth mirrored give the same figures, which they do not if one of the two stays as it was."""
    folder, _ = trained_segmentor
    figures = []
    data = draw_scenes(tmp_path / "data", train=1, val=1, first=0, suffix=".png")
    options = ["--tta", "--work-dir", tmp_path / "tested", "--cfg-options", "test_dataloader.dataset.img_suffix=.png",
               f"test_dataloader.dataset.data_root={data}"]  # fmt: skip
    for mirrored in ((), (data / "images",), (data / "annotations",)):
        for path in (path for part in mirrored for path in part.rglob("*.png")):
            Image.fromarray(np.asarray(Image.open(path))[:, ::-1]).save(path)
        tool(mmseg, "test", "work_dirs/rooms/own.py", "work_dirs/rooms/iter_20.pth", *options, folder=folder)
        figures.append(result_record(tmp_path / "tested")["metrics"]["mIoU"])
    assert figures[2] == pytest.approx(figures[0], abs=0.2)
    assert abs(figures[1] - figures[0]) > 1
    # README's pipeline, run here, is the base's where the size is the base's.
    own = own_config("segmentation", tmp_path, {"size": "(512, 512)"})
    assert Config.fromfile(own).tta_pipeline == Config.fromfile(CONFIGS["fpn_poolformer-s12"]).tta_pipeline


def test_training_without_the_data_ends_in_a_sentence(tmp_path, capfd, monkeypatch):
    """It names the page to get them; Python calls the hook with an error that nothing catches.

    PyTorch puts its own hook around that hook when the processes of several GPUs connect.
    """
    with pytest.raises(InputError) as caught:
        tool(mmdet, "train", CONFIGS["retinanet_poolformer-s12"], *SMALL, folder=tmp_path)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    torch.distributed.destroy_process_group()
    for traced, says in (
        ("", r"error: there is no annotation file data/.*cocodataset.org.*\n"),
        ("1", r"Traceback .*"),
    ):
        monkeypatch.setenv("METAFORMER_TRACEBACK", traced)
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            sys.excepthook(caught.type, caught.value, caught.tb)
        assert ended.value.code == 2
        assert re.fullmatch(says, capfd.readouterr().err, re.DOTALL)
    with pytest.raises(InputError, match=r"there is no picture .* in data/.*data\.csail\.mit\.edu"):
        tool(mmseg, "train", CONFIGS["fpn_poolformer-s12"], *SMALL, folder=tmp_path)


def test_mim_starts_the_programs(tmp_path, monkeypatch):
    """With the options that the READMEs give, but here without the programs."""
    from mim.cli import cli  # here, because it imports pip

    started = []
    monkeypatch.setattr(subprocess, "check_output", lambda words: b"")  # the program's help
    monkeypatch.setattr(
        subprocess, "check_call", lambda words, env: started.append(f"{' '.join(words)} {env['MASTER_PORT']}") or 0
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.py").write_text("")
    programs = r"\S+/\.mim/tools"
    slurm = "--launcher slurm --gpus 16 --gpus-per-node 8 --partition gpu"
    srun = "srun -p gpu --gres=gpu:8 --ntasks=16 --ntasks-per-node=8 --cpus-per-task=2 --kill-on-bad-exit=1"
    for command, expected in (
        ("train mmdet tiny.py --gpus 0", rf"\S+ {programs}/train\.py tiny\.py --launcher none \d{{5}}"),
        (
            "train mmdet tiny.py --launcher pytorch --gpus 8",
            rf"\S+ -m torch\.distributed\.launch --nproc_per_node=8 --master_port=(\d{{5}}) {programs}/train\.py "
            r"tiny\.py --launcher pytorch \1",
        ),
        (f"train mmdet tiny.py {slurm}", rf"{srun} .* {programs}/train\.py tiny\.py --launcher slurm \d{{5}}"),
        (
            f"test mmsegmentation tiny.py --checkpoint x.pth {slurm}",
            rf"{srun} .* {programs}/test\.py tiny\.py x\.pth --launcher slurm \d{{5}}",
        ),
    ):
        cli.main(command.split(), standalone_mode=False)
        assert re.fullmatch(expected, started.pop()), command


def test_a_record_names_the_command_as_it_was_typed(tmp_path):
    """In a copy of /proc: a worker, which a launcher started, which mim started, which a shell started."""
    processes = {
        "self": ["python", "train.py", "my config.py"],
        "30": ["python", "-m", "torch.distributed.launch", "train.py", "my config.py"],
        "20": ["python", "/somewhere/bin/mim", "train", "mmdet", "my config.py", "--gpus", "2"],
        "10": ["bash"],
    }
    hidden = 300 * "9"  # a name that the system refuses to look up, as it does for hidden processes
    for (number, words), parent in zip(processes.items(), ("30", "20", "10", hidden), strict=True):
        (tmp_path / number).mkdir()
        (tmp_path / number / "cmdline").write_text("".join(word + "\0" for word in words))
        (tmp_path / number / "stat").write_text(f"{number} (a (strange) name) S {parent} 1 1")
    assert mim_command(tmp_path / "self") == "mim train mmdet 'my config.py' --gpus 2"
    assert mim_command(tmp_path / "10") is None


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_predict_draws_a_picture(task, request, command, tmp_path):
    forget_runs()
    folder, _ = request.getfixturevalue("trained_detector" if task == "detection" else "trained_segmentor")
    picture = tmp_path / "red.jpg"
    Image.new("RGB", (90, 70), "red").save(picture)
    work_dir = folder / "work_dirs" / ("street" if task == "detection" else "rooms")
    checkpoint = next(work_dir.glob("*_[12]*.pth"))
    status, printed, _ = command(f"{task}/predict.py", work_dir / "own.py", checkpoint, picture, "--out", tmp_path)
    assert (status, printed.splitlines()[-1]) == (0, str(tmp_path / f"{picture.stem}.png"))
    drawn = Image.open(tmp_path / f"{picture.stem}.png")
    assert drawn.size == Image.open(picture).size
    pixels = np.asarray(drawn, dtype=int)
    assert (pixels[..., 0] - pixels[..., 2]).mean() > 0  # whatever is drawn on it, it is red and not blue
    if task == "segmentation":  # every pixel has a class; a detector so young may be sure of nothing
        assert (np.abs(pixels - np.asarray(Image.open(picture))).mean(-1) > 10).mean() > 0.5


def test_predict_names_what_is_wrong(trained_segmentor, command, tmp_path):
    folder, _ = trained_segmentor
    known = [folder / "work_dirs/rooms/own.py", folder / "work_dirs/rooms/iter_20.pth"]
    here, there = (tmp_path / name / "x.png" for name in ("a", "b"))
    for path in (here, there):
        path.parent.mkdir()
        Image.new("RGB", (64, 64)).save(path)
    written = {
        "broken.py": "model = dict(",
        "list.yaml": "- 1",
        "without_model.py": "default_scope = 'mmseg'",
        "without_scope.py": "model = dict(type='EncoderDecoder')",
        "model_alone.py": "default_scope = 'mmseg'\nmodel = dict(type='EncoderDecoder')",
    }
    for name, text in written.items():
        (tmp_path / name).write_text(text)
    other = " is not the config of a model of mmseg"
    for arguments, says in (
        ([*known, "no.jpg"], "there is no picture no.jpg"),
        ([*known, known[1]], "is not a picture"),
        ([*known, here, "--device", "gpu"], "argument --device: invalid choice: 'gpu'"),
        ([*known, here, "--device", "cuda:99"], "argument --device: invalid choice: 'cuda:99'"),
        (["no.py", *known], "there is no config no.py"),
        ([tmp_path / "broken.py", *known], "cannot read the config"),
        ([tmp_path / "list.yaml", *known], "cannot read the config"),
        ([tmp_path / "without_model.py", *known], f"without_model.py{other}"),
        ([tmp_path / "without_scope.py", *known], f"without_scope.py{other}"),
        ([tmp_path / "model_alone.py", *known], "model_alone.py has no test_dataloader and no visualizer: use"),
        ([CONFIGS["retinanet_poolformer-s12"], *known], f"{CONFIGS['retinanet_poolformer-s12'].name}{other}"),
        ([*known, here, there, "--out", tmp_path], "would overwrite another picture: use another --out"),
        ([*known, here, "--out", here.parent], "would overwrite another picture: use another --out"),
        ([*known, here, "--out", known[0]], f"cannot write {known[0]}/x.png"),
    ):
        status, _, error = command("segmentation/predict.py", *arguments)
        assert status == 2
        assert re.fullmatch(f"error: .*{re.escape(says)}.*\n", error[error.index("error: ") :])


def test_mmdets_own_inferencer_finds_the_same_with_a_config_and_without(trained_detector):
    folder, _ = trained_detector
    config, checkpoint = (str(folder / "work_dirs/street" / name) for name in ("own.py", "epoch_1.pth"))
    picture = str(next((folder / "data/street/val").iterdir()))
    found = [
        DetInferencer(model, checkpoint, device="cpu")(picture)["predictions"][0]["bboxes"] for model in (config, None)
    ]
    assert found[0]
    assert found[0] == found[1]


def test_importing_changes_nothing_but_by_the_one_module(tmp_path):
    """mmengine's loaders, torch's safe classes, timm's endings and the hook for uncaught errors stay as they were.

    In a process of its own, since other tests import mmengine. Importing and reading need no other toolbox.
    """
    history = HistoryBuffer([1.0, 2.0], [1, 1])
    torch.save({"history": history, "args": argparse.Namespace(model="x")}, tmp_path / "mmengine.pth")
    save_run(tmp_path / "run")
    code = f"""import argparse, importlib, pkgutil, sys
import torch, torch._dynamo  # the latter puts a class of its own on the list
from timm.data import get_img_extensions

def state():
    return torch.serialization.get_safe_globals(), get_img_extensions(), sys.excepthook

before = state()
import metaformer
metaformer.open_checkpoint({str(tmp_path / "run")!r})
heavy = {{"mmengine", "pydantic", "matplotlib", "pandas", "transformers", "fvcore", "cv2"}}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
assert state() == before

torch.serialization.add_safe_globals([argparse.Namespace])
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader
before, loaders = state(), dict(CheckpointLoader._schemes)
read = metaformer.weights.read_checkpoint({str(tmp_path / "mmengine.pth")!r})
assert type(read["history"]) is HistoryBuffer
assert not any(name.startswith("metaformer.mm") for name in sys.modules)
for module in pkgutil.walk_packages(metaformer.__path__, "metaformer."):
    if not module.name.endswith((".__main__", ".patch_mmengine")):
        importlib.import_module(module.name)
        assert (state(), CheckpointLoader._schemes) == (before, loaders), module.name
import metaformer.mm.patch_mmengine
assert state()[:2] == before[:2]
assert state()[2] != before[2]
assert CheckpointLoader._schemes != loaders
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
