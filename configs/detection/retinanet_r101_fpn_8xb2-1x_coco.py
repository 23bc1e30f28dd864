# RetinaNet, ResNet-101, 1x on COCO: box AP 38.5, 56.7 M parameters in the paper (Table 3).
# 8 A100 x 2 pictures in the paper; not run here.
#   mim train mmdet configs/detection/retinanet_r101_fpn_8xb2-1x_coco.py \
#     --launcher pytorch --gpus 8
#   mim test mmdet configs/detection/retinanet_r101_fpn_8xb2-1x_coco.py \
#     --checkpoint work_dirs/retinanet_r101_fpn_8xb2-1x_coco/epoch_12.pth --launcher pytorch --gpus 8
_base_ = ["_base_/retinanet.py", "_base_/coco_1x.py"]
model = dict(
    backbone=dict(
        type="ResNet",
        depth=101,
        out_indices=(1, 2, 3),
        frozen_stages=1,
        norm_eval=True,
        init_cfg=dict(type="Pretrained", checkpoint="https://download.pytorch.org/models/resnet101-63fe2227.pth"),
    ),
    neck=dict(in_channels=[512, 1024, 2048]),
)
