# Semantic FPN, PVT-Large, 40,000 iterations on ADE20K: mIoU 42.1, 65.1 M parameters in the paper (Table 4).
# 8 A100 x 4 pictures in the paper; not run here.
#   mim train mmsegmentation configs/segmentation/fpn_pvt-large_8xb4-40k_ade20k-512x512.py \
#     --launcher pytorch --gpus 8
#   mim test mmsegmentation configs/segmentation/fpn_pvt-large_8xb4-40k_ade20k-512x512.py \
#     --checkpoint work_dirs/fpn_pvt-large_8xb4-40k_ade20k-512x512/iter_40000.pth --launcher pytorch --gpus 8
_base_ = "_base_/fpn_ade20k_40k.py"
checkpoint = "https://github.com/whai362/PVT/releases/download/v2/pvt_large.pth"
model = dict(
    backbone=dict(
        type="mmdet.PyramidVisionTransformer",
        num_layers=[3, 8, 27, 3],
        init_cfg=dict(type="Pretrained", checkpoint=checkpoint),
    ),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
