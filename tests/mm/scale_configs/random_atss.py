"""ATSS with BatchNorm in training, mmdet's random transforms and averaged weights."""

_base_ = ["atss.py"]
model = dict(backbone=dict(norm_eval=False))
random_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="RandomAffine", max_rotate_degree=5.0, scaling_ratio_range=(0.9, 1.1)),
    dict(type="PhotoMetricDistortion"),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackDetInputs"),
]
train_dataloader = dict(dataset=dict(pipeline=random_pipeline))
train_cfg = dict(max_epochs=3)
custom_hooks = [dict(type="EMAHook", ema_type="ExpMomentumEMA", momentum=0.1, update_buffers=True, priority=49)]
