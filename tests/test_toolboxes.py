"""The backbone in mmdet and mmseg: against other implementations of its features, in every config, through mim."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm.models.metaformer as timm_metaformer
import torch
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.optim import OptimWrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import CheckpointLoader
from mmengine.structures import InstanceData, PixelData
from mmseg.apis import inference_model
from mmseg.structures import SegDataSample
from PIL import Image
from torch import nn

import metaformer.mm.detection
import metaformer.mm.segmentation
from conftest import ROOT
from drawn import detection_config, draw_coco, draw_scenes, segmentation_config
from metaformer import InputError, records
from metaformer.mm.backbone import MetaFormerBackbone
from metaformer.mm.predict import predict
from oracles import OFFICIAL_NAMES, TIMM_NAMES, renamed

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
    torch.save({"state_dict": detector.state_dict(), "meta": {}}, tmp_path / "epoch_12.pth")
    classifier = metaformer.variants.entry_point("poolformer_s12")(num_classes=3)
    head = classifier.head.weight.clone()
    with pytest.raises(InputError, match="holds a backbone without a classifier: use replace_head=true"):
        metaformer.load_weights(classifier, tmp_path / "epoch_12.pth")
    assert metaformer.load_weights(classifier, tmp_path / "epoch_12.pth", replace_head=True) == "toolbox"
    images = torch.randn(1, 3, 64, 64)
    levels = detector["backbone"].forward_intermediates(images, intermediates_only=True)
    torch.testing.assert_close(classifier.forward_features(images), levels[-1])
    assert torch.equal(classifier.head.weight, head)

    # What mmengine pickles is allowed when it is met, in a program that knows nothing of the toolboxes.
    history = HistoryBuffer(np.ones(3), np.ones(3))
    torch.save({"state_dict": detector.state_dict(), "message_hub": {"loss": history}}, tmp_path / "epoch_12.pth")
    code = f"""import sys, timm, metaformer
model = timm.create_model("poolformer_s12", num_classes=3)
assert "mmengine" not in sys.modules
assert metaformer.load_weights(model, {str(tmp_path / "epoch_12.pth")!r}, replace_head=True) == "toolbox"
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_readme_s_mixer_of_ones_own():
    """The snippet of detection/README.md, run as it stands."""
    snippet = next(s for s in re.findall(r"```python\n(.*?)```", README.read_text(), re.S) if "register_module" in s)
    exec(snippet, {})
    model = MODELS.build({"type": "ShiftFormer", "out_indices": (1, 2, 3)})
    assert "ShiftMixer" in str(model)
    assert [level.shape[1] for level in model(torch.randn(1, 3, 64, 64))] == [128, 320, 512]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"variant": "poolformer_s21"}, "there is no variant 'poolformer_s21' (did you mean 'poolformer_"),
        ({"out_indices": (0, 4)}, "out_indices=(0, 4): poolformer_s12 has the levels 0 to 3"),
        ({"out_indices": (3, 1)}, "out_indices=(3, 1)"),
        ({"out_indices": ()}, "out_indices=()"),
        ({"frozen_stages": 5}, "frozen_stages=5"),
        ({"init_cfg": {"type": "Kaiming"}}, "init_cfg"),
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


def test_pretrained_takes_the_backbone_of_a_segmentor(tmp_path):
    source = randomised(backbone())
    weights = {f"backbone.{name}": tensor for name, tensor in source.state_dict().items()}
    torch.save({"state_dict": {**weights, "decode_head.conv.weight": torch.ones(1)}}, tmp_path / "iter_9.pth")
    cfg = {"type": "Pretrained", "checkpoint": str(tmp_path / "iter_9.pth"), "prefix": "backbone."}
    model = backbone(out_indices=(1, 2, 3), init_cfg=cfg)
    model.init_weights()
    assert torch.equal(model.out_norms["3"].weight, source.out_norms["3"].weight)
    assert torch.equal(model.stem.weight, source.stem.weight)


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
    with pytest.raises(InputError, match="does not fit the backbone poolformer_s24: 120 missing"):
        backbone(variant="poolformer_s24", init_cfg=cfg).init_weights()


def test_download_is_cached_and_a_dead_address_named(tmp_path, official, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    fetched = []
    monkeypatch.setattr(
        torch.hub,
        "download_url_to_file",
        lambda url, path, progress: fetched.append(url) or Path(path).write_bytes(official[0].read_bytes()),
    )
    for _ in range(2):
        checkpoint = CheckpointLoader.load_checkpoint("https://example.org/poolformer_s12.pth.tar")
        assert checkpoint.keys() == torch.load(official[0]).keys()
    assert fetched == ["https://example.org/poolformer_s12.pth.tar"]
    cached = tmp_path / "hub/checkpoints/poolformer_s12.pth.tar"
    cached.write_bytes(cached.read_bytes()[:9999])
    with pytest.raises(InputError, match="damaged"):
        CheckpointLoader.load_checkpoint("https://example.org/poolformer_s12.pth.tar")
    CheckpointLoader.load_checkpoint("https://example.org/poolformer_s12.pth.tar")
    assert len(fetched) == 2
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


@pytest.mark.parametrize("row", CONFIGS)
def test_config_builds_trains_and_infers(row):
    """Parameters as printed, one training step in which every trainable tensor gets its gradient, and one inference."""
    torch.manual_seed(0)
    config = Config.fromfile(CONFIGS[row])
    init_default_scope(config.default_scope)
    config.model.backbone.init_cfg = None
    if row in TABLE_4:
        config.model.data_preprocessor.size = (64, 64)
    if row.startswith("mask-rcnn"):  # 1000 proposals take their time even on a tiny picture
        config.model.train_cfg.rpn_proposal.max_per_img = config.model.test_cfg.rpn.max_per_img = 20
    model = MODELS.build(config.model)
    counts_all = row in TABLE_4 or "poolformer" in row
    counted = sum(p.numel() for p in model.parameters() if counts_all or p.requires_grad)
    assert round(counted / 1e6, 1) == COUNTED.get(row, {**TABLE_3, **TABLE_4}[row])

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


# Through mim


def mim(*arguments, folder: Path, status: int = 0) -> str:
    """Run mim in ``folder``; gives what it printed."""
    command = [str(Path(sys.executable).with_name("mim")), *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    printed = done.stdout + done.stderr
    assert done.returncode == status, printed[-3000:]
    return printed


@pytest.fixture(scope="module")
def trained_detector(tmp_path_factory):
    folder = tmp_path_factory.mktemp("detector")
    detection_config(folder / "tiny.py", draw_coco(folder / "data"))
    return folder, mim("train", "mmdet", "tiny.py", "--gpus", 0, folder=folder)


@pytest.fixture(scope="module")
def trained_segmentor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("segmentor")
    segmentation_config(folder / "tiny.py", draw_scenes(folder / "data"))
    return folder, mim("train", "mmsegmentation", "tiny.py", "--gpus", 0, folder=folder)


def losses(log: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"\(train\).*?loss: (\d+\.\d+)", log)]


def test_mim_trains_a_detector_tests_and_resumes_it(trained_detector):
    folder, log = trained_detector
    assert losses(log)[-1] < losses(log)[0]
    checkpoint = "work_dirs/tiny/epoch_2.pth"
    tested = mim("test", "mmdet", "tiny.py", "--gpus", 0, "--checkpoint", checkpoint, folder=folder)
    record = json.loads(Path(re.search(r"result record: (.*)", tested)[1]).read_text())
    # The figures of the record are those of the evaluation at the end of training.
    trained = {name: float(value) for name, value in re.findall(r"(coco/\w+): (-?[\d.]+)", log.rpartition("(val)")[2])}
    assert {name: round(value, 4) for name, value in record["metrics"].items() if name in trained} == trained
    assert {"coco/bbox_mAP", "coco/segm_mAP"} <= trained.keys()
    assert record["command"].startswith("mim test mmdet tiny.py")
    assert record["data"]["images"] == 4
    assert len(record["checkpoint"]["sha256"]) == 64

    targets = records.import_records([folder / "work_dirs/tiny"], folder / "results")
    detection, training = (json.loads(path.read_text()) for path in sorted(targets))
    assert (detection["kind"], training["kind"]) == ("detection", "training")
    assert detection["metrics"] == record["metrics"]
    assert training["images_per_s"] > 0
    assert (training["devices"], training["settings"]["epochs"], training["data"]["classes"]) == (1, 2, 2)
    assert str(folder) not in "".join(path.read_text() for path in targets)

    resumed = mim("train", "mmdet", "tiny.py", "--gpus", 0, "--resume", "--cfg-options", "train_cfg.max_epochs=3",
                  folder=folder)  # fmt: skip
    assert "resumed epoch: 2, iter: 8" in resumed
    assert re.findall(r"Epoch\(train\) \[(\d)\]\[1/4\]", resumed) == ["3"]


def test_mim_trains_a_segmentor_and_tests_it(trained_segmentor):
    folder, log = trained_segmentor
    assert losses(log)[-1] < losses(log)[0]
    checkpoint = "work_dirs/tiny/iter_4.pth"
    tested = mim("test", "mmsegmentation", "tiny.py", "--gpus", 0, "--checkpoint", checkpoint, folder=folder)
    record = json.loads(Path(re.search(r"result record: (.*)", tested)[1]).read_text())
    assert round(record["metrics"]["mIoU"], 2) == float(re.findall(r"mIoU: ([\d.]+)", log)[-1])
    assert record["kind"] == "segmentation"
    assert record["data"]["classes"] == 3


def test_mim_ends_in_a_sentence_without_the_data(tmp_path):
    """From a folder that holds nothing, through both toolboxes: status 2, no traceback, and the page to get them."""
    for toolbox, config, page in (
        ("mmdet", CONFIGS["retinanet_poolformer-s12"], "cocodataset.org"),
        ("mmsegmentation", CONFIGS["fpn_poolformer-s12"], "data.csail.mit.edu"),
    ):
        options = ["--gpus", 0, "--cfg-options", "model.backbone.init_cfg=None"]
        printed = mim("train", toolbox, config, *options, folder=tmp_path, status=2)
        assert "Traceback" not in printed
        sentence = re.search(r"^error: (.*)$", printed, re.M)[1]
        assert page in sentence
        assert "data/" in sentence


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_predict_draws_a_picture(task, request, tmp_path):
    folder, _ = request.getfixturevalue("trained_detector" if task == "detection" else "trained_segmentor")
    picture = next((folder / "data").glob("**/val*/*.jpg"))
    checkpoint = next((folder / "work_dirs/tiny").glob("*_2.pth"))
    command = [sys.executable, ROOT / task / "predict.py", folder / "work_dirs/tiny/tiny.py", checkpoint, picture]
    done = subprocess.run([*command, "--out", tmp_path], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    drawn = Image.open(tmp_path / f"{picture.stem}.png")
    assert drawn.size == Image.open(picture).size
    if task == "segmentation":  # every pixel has a class; a detector so young may be sure of nothing
        change = np.abs(np.asarray(drawn, dtype=int) - np.asarray(Image.open(picture), dtype=int)).mean(-1)
        assert (change > 10).mean() > 0.5


def test_predict_names_what_is_no_picture(trained_segmentor, tmp_path, monkeypatch):
    folder, _ = trained_segmentor
    known = [str(folder / "work_dirs/tiny/tiny.py"), str(folder / "work_dirs/tiny/iter_2.pth")]
    for picture, says in (("no.jpg", "there is no picture"), (known[1], "is not a picture")):
        monkeypatch.setattr(sys, "argv", ["predict.py", *known, picture, "--out", str(tmp_path)])
        with pytest.raises(InputError, match=says):
            predict(inference_model, {})
    monkeypatch.setattr(sys, "argv", ["predict.py", "no.py", *known])
    with pytest.raises(InputError, match=r"there is no config no\.py"):
        predict(inference_model, {})
