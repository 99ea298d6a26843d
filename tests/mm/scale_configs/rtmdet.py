"""RTMDet with all that its COCO config trains with: images kept by transforms, averaged weights, a second pipeline."""

_base_ = ["base.py"]
stage1 = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="CachedMosaic", img_scale=(128, 128), pad_val=114.0, max_cached_images=6),
    dict(type="RandomResize", scale=(256, 256), ratio_range=(0.5, 1.5), keep_ratio=True),
    dict(type="RandomCrop", crop_size=(128, 128)),
    dict(type="YOLOXHSVRandomAug"),
    dict(type="RandomFlip", prob=0.5),
    dict(type="Pad", size=(128, 128), pad_val=dict(img=(114, 114, 114))),
    dict(
        type="CachedMixUp", img_scale=(128, 128), ratio_range=(1.0, 1.0), max_cached_images=4, pad_val=(114, 114, 114)
    ),
    dict(type="PackDetInputs"),
]
stage2 = [step for step in stage1 if step["type"] not in ("CachedMosaic", "CachedMixUp")]
train_dataloader = dict(dataset=dict(pipeline=stage1))
train_cfg = dict(max_epochs=4, dynamic_intervals=[(3, 1)])
optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=0.004, weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0, bias_decay_mult=0, bypass_duplicate=True),
)
custom_hooks = [
    dict(type="EMAHook", ema_type="ExpMomentumEMA", momentum=0.0002, update_buffers=True, priority=49),
    dict(type="PipelineSwitchHook", switch_epoch=2, switch_pipeline=stage2),
]
norm = dict(type="SyncBN")
model = dict(
    type="RTMDet",
    neck=dict(type="CSPNeXtPAFPN", out_channels=16, num_csp_blocks=1, norm_cfg=norm),
    bbox_head=dict(
        type="RTMDetSepBNHead",
        num_classes=10,
        in_channels=16,
        feat_channels=16,
        stacked_convs=1,
        anchor_generator=dict(type="MlvlPointGenerator", offset=0, strides=[8, 16]),
        bbox_coder=dict(type="DistancePointBBoxCoder"),
        loss_cls=dict(type="QualityFocalLoss", use_sigmoid=True, beta=2.0, loss_weight=1.0),
        loss_bbox=dict(type="GIoULoss", loss_weight=2.0),
        with_objectness=False,
        exp_on_reg=True,
        share_conv=True,
        pred_kernel_size=1,
        norm_cfg=norm,
    ),
    train_cfg=dict(
        assigner=dict(type="DynamicSoftLabelAssigner", topk=13), allowed_border=-1, pos_weight=-1, debug=False
    ),
)
