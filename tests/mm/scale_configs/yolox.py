"""YOLOX with all that its COCO config trains with: Mosaic, MixUp, random image sizes, averages, L1 at the end."""

_base_ = ["base.py"]
pipeline = [
    dict(type="Mosaic", img_scale=(128, 128), pad_val=114.0),
    dict(type="RandomAffine", scaling_ratio_range=(0.5, 1.5), border=(-64, -64)),
    dict(type="MixUp", img_scale=(128, 128), ratio_range=(0.8, 1.6), pad_val=114.0),
    dict(type="YOLOXHSVRandomAug"),
    dict(type="RandomFlip", prob=0.5),
    dict(type="Resize", scale=(128, 128), keep_ratio=True),
    dict(type="Pad", pad_to_square=True, pad_val=dict(img=(114.0, 114.0, 114.0))),
    dict(type="FilterAnnotations", min_gt_bbox_wh=(1, 1), keep_empty=False),
    dict(type="PackDetInputs"),
]
scenes = dict(
    type="CocoDataset",
    data_root="{{$SCENES:data/digit_scenes}}/",
    metainfo=dict(classes=("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")),
    ann_file="annotations/instances_train.json",
    data_prefix=dict(img="images/train/"),
    filter_cfg=dict(filter_empty_gt=False, min_size=32),
    pipeline=[dict(type="LoadImageFromFile"), dict(type="LoadAnnotations", with_bbox=True)],
)
train_dataloader = dict(
    dataset=dict(_delete_=True, type="MultiImageMixDataset", dataset=scenes, pipeline=pipeline),
)
train_cfg = dict(max_epochs=4)
optim_wrapper = dict(
    optimizer=dict(lr=0.01, nesterov=True, weight_decay=5e-4),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
)
custom_hooks = [
    dict(type="YOLOXModeSwitchHook", num_last_epochs=2, priority=48),
    dict(type="SyncNormHook", priority=48),
    dict(type="EMAHook", ema_type="ExpMomentumEMA", momentum=0.0001, update_buffers=True, priority=49),
]
model = dict(
    type="YOLOX",
    data_preprocessor=dict(
        _delete_=True,
        type="DetDataPreprocessor",
        pad_size_divisor=16,
        batch_augments=[dict(type="BatchSyncRandomResize", random_size_range=(96, 160), size_divisor=32, interval=4)],
    ),
    neck=dict(type="YOLOXPAFPN", out_channels=16, num_csp_blocks=1),
    bbox_head=dict(type="YOLOXHead", num_classes=10, in_channels=16, feat_channels=16, strides=(8, 16)),
    train_cfg=dict(assigner=dict(type="SimOTAAssigner", center_radius=2.5)),
    test_cfg=dict(_delete_=True, score_thr=0.01, nms=dict(type="nms", iou_threshold=0.65)),
)
