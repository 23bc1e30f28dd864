# Semantic FPN, PVT-Medium, 40,000 iterations on ADE20K: mIoU 41.6, 48.0 M parameters in the paper (Table 4).
# 8 A100 x 4 pictures in the paper; not run here.
#   mim train mmsegmentation configs/segmentation/fpn_pvt-medium_8xb4-40k_ade20k-512x512.py \
#     --launcher pytorch --gpus 8
#   mim test mmsegmentation configs/segmentation/fpn_pvt-medium_8xb4-40k_ade20k-512x512.py \
#     --checkpoint work_dirs/fpn_pvt-medium_8xb4-40k_ade20k-512x512/iter_40000.pth --launcher pytorch --gpus 8
_base_ = "_base_/fpn_ade20k_40k.py"
checkpoint = "https://github.com/whai362/PVT/releases/download/v2/pvt_medium.pth"
model = dict(
    backbone=dict(
        type="mmdet.PyramidVisionTransformer",
        num_layers=[3, 4, 18, 3],
        init_cfg=dict(type="Pretrained", checkpoint=checkpoint),
    ),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
