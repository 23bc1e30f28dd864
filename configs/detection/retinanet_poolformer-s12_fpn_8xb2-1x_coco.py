# RetinaNet, PoolFormer-S12, 1x on COCO: box AP 36.2, 21.7 M parameters in the paper (Table 3).
# 8 A100 x 2 pictures in the paper; not run here.
#   mim train mmdet configs/detection/retinanet_poolformer-s12_fpn_8xb2-1x_coco.py \
#     --launcher pytorch --gpus 8
#   mim test mmdet configs/detection/retinanet_poolformer-s12_fpn_8xb2-1x_coco.py \
#     --checkpoint work_dirs/retinanet_poolformer-s12_fpn_8xb2-1x_coco/epoch_12.pth --launcher pytorch --gpus 8
_base_ = ["_base_/retinanet.py", "_base_/coco_1x.py"]
checkpoint = "https://github.com/sail-sg/poolformer/releases/download/v1.0/poolformer_s12.pth.tar"
model = dict(
    backbone=dict(
        type="MetaFormer",
        variant="poolformer_s12",
        out_indices=(1, 2, 3),
        init_cfg=dict(type="Pretrained", checkpoint=checkpoint),
    ),
    neck=dict(in_channels=[128, 320, 512]),
)
