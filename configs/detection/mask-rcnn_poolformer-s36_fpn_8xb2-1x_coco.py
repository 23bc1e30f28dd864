# Mask R-CNN, PoolFormer-S36, 1x on COCO: box AP 41.0, mask AP 37.7, 50.5 M parameters in the paper (Table 3).
# 8 A100 x 2 pictures in the paper; not run here.
#   mim train mmdet configs/detection/mask-rcnn_poolformer-s36_fpn_8xb2-1x_coco.py \
#     --launcher pytorch --gpus 8
#   mim test mmdet configs/detection/mask-rcnn_poolformer-s36_fpn_8xb2-1x_coco.py \
#     --checkpoint work_dirs/mask-rcnn_poolformer-s36_fpn_8xb2-1x_coco/epoch_12.pth --launcher pytorch --gpus 8
_base_ = ["_base_/mask_rcnn.py", "_base_/coco_1x.py"]
checkpoint = "https://github.com/sail-sg/poolformer/releases/download/v1.0/poolformer_s36.pth.tar"
model = dict(
    backbone=dict(type="MetaFormer", variant="poolformer_s36", init_cfg=dict(type="Pretrained", checkpoint=checkpoint)),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
