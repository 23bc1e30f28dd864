# Semantic FPN, ResNeXt-101-32x4d, 40,000 iterations on ADE20K: mIoU 39.7, 47.1 M parameters in the paper (Table 4).
# 8 A100 x 4 pictures in the paper; not run here.
#   mim train mmsegmentation configs/segmentation/fpn_x101-32x4d_8xb4-40k_ade20k-512x512.py \
#     --launcher pytorch --gpus 8
#   mim test mmsegmentation configs/segmentation/fpn_x101-32x4d_8xb4-40k_ade20k-512x512.py \
#     --checkpoint work_dirs/fpn_x101-32x4d_8xb4-40k_ade20k-512x512/iter_40000.pth --launcher pytorch --gpus 8
_base_ = "_base_/fpn_ade20k_40k.py"
checkpoint = "https://download.openmmlab.com/pretrain/third_party/resnext101_32x4d-a5af3160.pth"
model = dict(
    backbone=dict(
        type="ResNeXt",
        depth=101,
        groups=32,
        base_width=4,
        norm_cfg=dict(type="SyncBN", requires_grad=True),
        init_cfg=dict(type="Pretrained", checkpoint=checkpoint),
    ),
    neck=dict(in_channels=[256, 512, 1024, 2048]),
)
