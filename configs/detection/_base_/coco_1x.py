# COCO 2017 and the 1x schedule, shared by RetinaNet and Mask R-CNN (paper: section 4.2). Paper and official configs
# agree unless a comment says otherwise; "official" is detection/configs of sail-sg/poolformer on mmdet 2.19.
#
# All ResNet results of Table 3 equal those of the PVT paper (arXiv 2102.12122), which has the same recipe: AdamW, 16
# pictures, 12 epochs.
custom_imports = dict(imports=["metaformer.mm.detection", "metaformer.mm.patch_mmengine"], allow_failed_imports=False)
default_scope = "mmdet"

# Evaluation; the training data are in the detector's file, since only Mask R-CNN loads masks
val_dataloader = dict(
    batch_size=1,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="CheckedCocoDataset",
        data_root="data/coco/",
        ann_file="annotations/instances_val2017.json",
        data_prefix=dict(img="val2017/"),
        test_mode=True,
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="Resize", scale=(1333, 800), keep_ratio=True),  # paper: short side 800
            dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
        ],
    ),
)
test_dataloader = val_dataloader

# Schedule
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=12, val_interval=1)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=500),  # official
    dict(type="MultiStepLR", by_epoch=True, begin=0, end=12, milestones=[8, 11], gamma=0.1),
]
auto_scale_lr = dict(enable=False, base_batch_size=16)  # 8 GPUs x 2; --auto-scale-lr adapts lr to another batch

# Execution
default_hooks = dict(
    logger=dict(type="LoggerHook", interval=50),
    checkpoint=dict(type="CheckpointHook", interval=1, max_keep_ckpts=2),
    visualization=dict(type="DetVisualizationHook"),
    input_checks=dict(type="InputChecks"),
    result_record=dict(type="ResultRecord"),
)
env_cfg = dict(
    cudnn_benchmark=False, mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0), dist_cfg=dict(backend="nccl")
)
visualizer = dict(type="DetLocalVisualizer", vis_backends=[dict(type="LocalVisBackend")], name="visualizer")
log_processor = dict(type="LogProcessor", window_size=50, by_epoch=True)
randomness = dict(seed=0)  # official: none
