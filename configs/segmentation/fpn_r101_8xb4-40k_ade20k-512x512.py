# Semantic FPN, ResNet-101, 40,000 iterations on ADE20K: mIoU 38.8, 47.5 M parameters in the paper (Table 4).
# 8 A100 x 4 pictures in the paper; not run here.
#   mim train mmsegmentation configs/segmentation/fpn_r101_8xb4-40k_ade20k-512x512.py \
#     --launcher pytorch --gpus 8
#   mim test mmsegmentation configs/segmentation/fpn_r101_8xb4-40k_ade20k-512x512.py \
#     --checkpoint work_dirs/fpn_r101_8xb4-40k_ade20k-512x512/iter_40000.pth --launcher pytorch --gpus 8
_base_ = "_base_/fpn_ade20k_40k.py"
model = dict(
    backbone=dict(
        type="ResNet",
        depth=101,
        norm_cfg=dict(type="SyncBN", requires_grad=True),
        init_cfg=dict(type="Pretrained", checkpoint="https://download.pytorch.org/models/resnet101-63fe2227.pth"),
    ),
    neck=dict(in_channels=[256, 512, 1024, 2048]),
)
