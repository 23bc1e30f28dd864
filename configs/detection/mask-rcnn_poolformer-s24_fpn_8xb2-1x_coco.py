# Mask R-CNN, PoolFormer-S24, 1x on COCO: box AP 40.1, mask AP 37.0, 41.0 M parameters in the paper (Table 3).
# 8 A100 x 2 pictures in the paper; not run here.
#   mim train mmdet configs/detection/mask-rcnn_poolformer-s24_fpn_8xb2-1x_coco.py \
#     --launcher pytorch --gpus 8
#   mim test mmdet configs/detection/mask-rcnn_poolformer-s24_fpn_8xb2-1x_coco.py \
#     --checkpoint work_dirs/mask-rcnn_poolformer-s24_fpn_8xb2-1x_coco/epoch_12.pth --launcher pytorch --gpus 8
_base_ = ["_base_/mask_rcnn.py", "_base_/coco_1x.py"]
checkpoint = "https://github.com/sail-sg/poolformer/releases/download/v1.0/poolformer_s24.pth.tar"
model = dict(
    backbone=dict(type="MetaFormer", variant="poolformer_s24", init_cfg=dict(type="Pretrained", checkpoint=checkpoint)),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
