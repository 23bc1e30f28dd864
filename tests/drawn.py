"""Small data sets of drawn pictures, in COCO's and ADE20K's layout, and configs that train on them in seconds."""

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from conftest import ROOT

SHAPES = ("square", "disc")


def draw_coco(root: Path, train: int = 8, val: int = 4) -> Path:
    """Pictures with a red square and a blue disc each; boxes, polygons and one crowd that is to be ignored."""
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
        categories = [{"id": 1, "name": "square"}, {"id": 7, "name": "disc"}]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"{split}.json").write_text(json.dumps(content))
    return root


def draw_scenes(root: Path, train: int = 8, val: int = 4) -> Path:
    """Pictures of sky, ground and a house, labels 1 to 3, with a strip of 0, which is ignored."""
    rng = np.random.default_rng(0)
    for split, number in (("training", train), ("validation", val)):
        (root / "images" / split).mkdir(parents=True)
        (root / "annotations" / split).mkdir(parents=True)
        for i in range(number):
            labels = np.ones((70 + i, 90), dtype=np.uint8)
            labels[35 + 2 * i :] = 2
            labels[20:50, 10 + 3 * i : 45 + 3 * i] = 3
            labels[:, -4:] = 0
            colours = np.array([[0, 0, 0], [120, 170, 230], [90, 140, 60], [170, 80, 60]])
            pixels = colours[labels] + rng.integers(-20, 20, (*labels.shape, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / "images" / split / f"{i:03d}.jpg")
            Image.fromarray(labels).save(root / "annotations" / split / f"{i:03d}.png")
    return root


def detection_config(
    path: Path, data: Path, base: str = "mask-rcnn_poolformer-s12_fpn_8xb2-1x_coco", more: str = ""
) -> Path:
    """A config like the one in detection/README.md, for :func:`draw_coco`, on pictures of 96 pixels, 2 epochs."""
    steps = '[dict(type="LoadImageFromFile"), {load}dict(type="Resize", scale=(96, 96), keep_ratio=True), {pack}]'
    masks = "mask" in base
    train = steps.format(
        load=f'dict(type="LoadAnnotations", with_bbox=True, with_mask={masks}), ', pack='dict(type="PackDetInputs")'
    )
    keys = '("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")'
    test = steps.format(load="", pack=f'dict(type="PackDetInputs", meta_keys={keys})')
    model = "bbox_head=dict(num_classes=2)"
    if masks:
        model = """
    roi_head=dict(bbox_head=dict(num_classes=2), mask_head=dict(num_classes=2)),
    train_cfg=dict(rpn_proposal=dict(max_per_img=40), rcnn=dict(sampler=dict(num=32))),
    test_cfg=dict(rpn=dict(max_per_img=40), rcnn=dict(max_per_img=10))"""
    path.write_text(f"""
_base_ = "{ROOT}/configs/detection/{base}.py"
data = dict(data_root="{data}/", metainfo=dict(classes={SHAPES}))
loading = dict(num_workers=0, persistent_workers=False)
train_set = dict(ann_file="annotations/train.json", data_prefix=dict(img="train/"), pipeline={train}, **data)
train_dataloader = dict(dataset=train_set, **loading)
val_set = dict(ann_file="annotations/val.json", data_prefix=dict(img="val/"), pipeline={test}, **data)
val_dataloader = dict(dataset=val_set, **loading)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file="{data}/annotations/val.json")
test_evaluator = val_evaluator
model = dict(backbone=dict(init_cfg=None), {model})
train_cfg = dict(max_epochs=2)
default_hooks = dict(logger=dict(interval=1))
{more}
""")
    return path


def segmentation_config(
    path: Path, data: Path, base: str = "fpn_poolformer-s12_8xb4-40k_ade20k-512x512", more: str = ""
) -> Path:
    """A config like the one in segmentation/README.md, for :func:`draw_scenes`, on crops of 64 pixels, 4 iterations."""
    path.write_text(f"""
_base_ = "{ROOT}/configs/segmentation/{base}.py"
data = dict(
    type="CheckedSegDataset",
    data_root="{data}",
    metainfo=dict(classes=("sky", "ground", "house")),
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
    backbone=dict(init_cfg=None), data_preprocessor=dict(size=(64, 64)), decode_head=dict(num_classes=3))
train_cfg = dict(max_iters=4, val_interval=4)
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=2))
{more}
""")
    return path
