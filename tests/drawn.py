"""Small data sets of drawn pictures, in COCO's and ADE20K's layout, and configs that train on them in seconds."""

import json
from pathlib import Path

import mmengine.config
import numpy as np
from mmdet.visualization import DetLocalVisualizer
from mmengine.logging import MessageHub, MMLogger
from mmengine.registry import DefaultScope
from mmseg.visualization import SegLocalVisualizer
from PIL import Image, ImageDraw

from conftest import ROOT

SHAPES = ("square", "disc")
SCENES = ("sky", "ground", "house")


# mmengine formats the text of a config for each log and copy of it, which takes a second.
mmengine.config.config.FormatCode = lambda text, **_: (text, True)


def forget_runs() -> None:
    """Remove what mmengine keeps of earlier runs in this process under their names, which two runs can share.

    A visualizer writes to the folder of the first run. A run that starts in the same second as another, from a file of
    the same name, takes the other's registries, log and message hub.
    """
    for kind in (DetLocalVisualizer, SegLocalVisualizer, DefaultScope, MMLogger, MessageHub):
        kind._instance_dict.clear()


def draw_coco(root: Path, train: int = 8, val: int = 4, classes: tuple[str, str] = SHAPES) -> Path:
    """Pictures with a red square and a blue disc each; boxes and polygons."""
    rng = np.random.default_rng(0)
    (root / "annotations").mkdir(parents=True)
    for split, number in (("train", train), ("val", val)):
        (root / split).mkdir()
        images, annotations = [], []
        for i in range(number):
            width, height = 80 + 4 * i, 64
            picture = Image.fromarray(rng.integers(90, 130, (height, width, 3), dtype=np.uint8))
            canvas = ImageDraw.Draw(picture)
            for category, colour in ((1, (220, 40, 40)), (7, (40, 40, 220))):
                side = int(rng.integers(16, 28))
                x = int(rng.integers(0, 12)) + (category == 7) * width // 2
                y = int(rng.integers(0, height - side))
                box = [x, y, x + side, y + side]
                if category == 1:
                    canvas.rectangle(box, fill=colour)
                    polygon = [x, y, x + side, y, x + side, y + side, x, y + side]
                else:
                    canvas.ellipse(box, fill=colour)
                    angle = np.linspace(0, 2 * np.pi, 16, endpoint=False)
                    circle = np.stack([np.cos(angle), np.sin(angle)], 1) * side / 2 + [x + side / 2, y + side / 2]
                    polygon = circle.ravel().tolist()
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": i + 1,
                        "category_id": category,
                        "bbox": [x, y, side, side],
                        "area": side * side,
                        "iscrowd": 0,
                        "segmentation": [polygon],
                    }
                )
            name = f"{i:03d}.jpg"
            picture.save(root / split / name, quality=95)
            images.append({"id": i + 1, "file_name": name, "width": width, "height": height})
        categories = [{"id": number, "name": name} for number, name in zip((1, 7), classes, strict=True)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"{split}.json").write_text(json.dumps(content))
    return root


def draw_scenes(root: Path, train: int = 8, val: int = 4, first: int = 1, suffix: str = ".jpg") -> Path:
    """Pictures of sky, ground and a house, with labels from ``first``, and a strip that is ignored (0 or 255)."""
    rng = np.random.default_rng(0)
    for split, number in (("training", train), ("validation", val)):
        (root / "images" / split).mkdir(parents=True)
        (root / "annotations" / split).mkdir(parents=True)
        for i in range(number):
            labels = np.ones((70 + i, 90), dtype=np.uint8)
            labels[35 + 2 * i :] = 2
            labels[20:50, 10 + 3 * i : 45 + 3 * i] = 3
            labels[:, -4:] = 0
            numbers = np.where(labels == 0, 0 if first else 255, labels + first - 1).astype(np.uint8)
            colours = np.array([[0, 0, 0], [120, 170, 230], [90, 140, 60], [170, 80, 60]])
            pixels = colours[labels] + rng.integers(-20, 20, (*labels.shape, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / "images" / split / f"{i:03d}{suffix}")
            Image.fromarray(numbers).save(root / "annotations" / split / f"{i:03d}.png")
    return root


def detection_config(path: Path, data: Path, base: str = "mask-rcnn", more: str = "") -> Path:
    """A config of a small detector on :func:`draw_coco`, with pictures of 96 pixels and 2 epochs."""
    steps = '[dict(type="LoadImageFromFile"), {load}dict(type="Resize", scale=(96, 96), keep_ratio=True), {pack}]'
    masks = base == "mask-rcnn"
    train = steps.format(
        load=f'dict(type="LoadAnnotations", with_bbox=True, with_mask={masks}), ', pack='dict(type="PackDetInputs")'
    )
    keys = '("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")'
    test = steps.format(load="", pack=f'dict(type="PackDetInputs", meta_keys={keys})')
    model = """
    neck=dict(in_channels=[16, 24, 32], out_channels=16),
    bbox_head=dict(num_classes=2, in_channels=16, feat_channels=16)"""
    if masks:
        model = """
    neck=dict(in_channels=[8, 16, 24, 32], out_channels=16),
    rpn_head=dict(in_channels=16, feat_channels=16),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=16),
        bbox_head=dict(num_classes=2, in_channels=16, fc_out_channels=64),
        mask_roi_extractor=dict(out_channels=16),
        mask_head=dict(num_classes=2, in_channels=16, conv_out_channels=16)),
    train_cfg=dict(rpn_proposal=dict(max_per_img=40), rcnn=dict(sampler=dict(num=32))),
    test_cfg=dict(rpn=dict(max_per_img=40), rcnn=dict(max_per_img=10))"""
    path.write_text(f"""
_base_ = "{ROOT}/configs/detection/{base}_poolformer-s12_fpn_8xb2-1x_coco.py"
data = dict(data_root="{data}/", metainfo=dict(classes={SHAPES}))
loading = dict(num_workers=0, persistent_workers=False)
train_set = dict(ann_file="annotations/train.json", data_prefix=dict(img="train/"), pipeline={train}, **data)
train_dataloader = dict(dataset=train_set, **loading)
val_set = dict(ann_file="annotations/val.json", data_prefix=dict(img="val/"), pipeline={test}, **data)
val_dataloader = dict(dataset=val_set, **loading)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file="{data}/annotations/val.json")
test_evaluator = val_evaluator
model = dict(backbone=dict(init_cfg=None, depths=[1, 1, 1, 1], dims=[8, 16, 24, 32]), {model})
train_cfg = dict(max_epochs=2)
default_hooks = dict(logger=dict(interval=1))
{more}
""")
    return path


def segmentation_config(path: Path, data: Path, more: str = "") -> Path:
    """A config of a small segmentor on :func:`draw_scenes`, with crops of 64 pixels and 4 iterations."""
    path.write_text(f"""
_base_ = "{ROOT}/configs/segmentation/fpn_poolformer-s12_8xb4-40k_ade20k-512x512.py"
data = dict(
    type="CheckedSegDataset",
    data_root="{data}",
    metainfo=dict(classes={SCENES}),
    reduce_zero_label=True)
loading = dict(num_workers=0, persistent_workers=False)
train_dataloader = dict(
    dataset=dict(
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="LoadAnnotations"),
            dict(type="RandomCrop", crop_size=(64, 64), cat_max_ratio=0.75),
            dict(type="PackSegInputs"),
        ],
        **data), **loading)
val_dataloader = dict(
    dataset=dict(
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="Resize", scale=(128, 64), keep_ratio=True),
            dict(type="ResizeToMultiple", size_divisor=32),
            dict(type="LoadAnnotations"),
            dict(type="PackSegInputs"),
        ],
        **data), **loading)
test_dataloader = val_dataloader
model = dict(
    backbone=dict(init_cfg=None, depths=[1, 1, 1, 1], dims=[8, 16, 24, 32]),
    neck=dict(in_channels=[8, 16, 24, 32], out_channels=16),
    decode_head=dict(num_classes=3, in_channels=[16, 16, 16, 16], channels=16),
    data_preprocessor=dict(size=(64, 64)))
train_cfg = dict(max_iters=4, val_interval=4)
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=2))
{more}
""")
    return path
