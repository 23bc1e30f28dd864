# Semantic FPN, PoolFormer-M48, 40,000 iterations on ADE20K: mIoU 42.7, 77.1 M parameters in the paper (Table 4).
# 8 A100 x 4 pictures in the paper; not run here.
#   mim train mmsegmentation configs/segmentation/fpn_poolformer-m48_8xb4-40k_ade20k-512x512.py \
#     --launcher pytorch --gpus 8
#   mim test mmsegmentation configs/segmentation/fpn_poolformer-m48_8xb4-40k_ade20k-512x512.py \
#     --checkpoint work_dirs/fpn_poolformer-m48_8xb4-40k_ade20k-512x512/iter_40000.pth --launcher pytorch --gpus 8
_base_ = "_base_/fpn_ade20k_40k.py"
checkpoint = "https://github.com/sail-sg/poolformer/releases/download/v1.0/poolformer_m48.pth.tar"
model = dict(
    backbone=dict(type="MetaFormer", variant="poolformer_m48", init_cfg=dict(type="Pretrained", checkpoint=checkpoint)),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
