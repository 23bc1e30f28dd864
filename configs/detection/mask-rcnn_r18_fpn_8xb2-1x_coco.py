# Mask R-CNN, ResNet-18, 1x on COCO: box AP 34.0, mask AP 31.2, 31.2 M parameters in the paper (Table 3).
# 8 A100 x 2 pictures in the paper; not run here.
#   mim train mmdet configs/detection/mask-rcnn_r18_fpn_8xb2-1x_coco.py \
#     --launcher pytorch --gpus 8
#   mim test mmdet configs/detection/mask-rcnn_r18_fpn_8xb2-1x_coco.py \
#     --checkpoint work_dirs/mask-rcnn_r18_fpn_8xb2-1x_coco/epoch_12.pth --launcher pytorch --gpus 8
_base_ = ["_base_/mask_rcnn.py", "_base_/coco_1x.py"]
model = dict(
    backbone=dict(
        type="ResNet",
        depth=18,
        frozen_stages=1,
        norm_eval=True,
        init_cfg=dict(type="Pretrained", checkpoint="https://download.pytorch.org/models/resnet18-f37072fd.pth"),
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
