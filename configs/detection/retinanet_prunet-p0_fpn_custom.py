"""RetinaNet + FPN with prunet_p0 for a few hundred images of your own, 640 px, batch 8 on one GPU (or a CPU).

python tools/train.py configs/detection/retinanet_prunet-p0_fpn_custom.py --train-json my/annotations.json
"""

_base_ = "../_base_/detectors/retinanet_fpn_1x_coco.py"

model = dict(
    backbone=dict(
        type="PruNet",
        arch="prunet_p0",
        init_cfg=dict(type="Pretrained", checkpoint="prunet://prunet_p0"),
    ),
)

size = (640, 640)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="RandomResize", scale=size, ratio_range=(0.7, 1.3), keep_ratio=True),
    dict(type="RandomCrop", crop_size=size, allow_negative_crop=True),
    dict(type="RandomFlip", prob=0.5),  # leave it out where left and right matter (text, traffic signs)
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=size, keep_ratio=True),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(
        type="PackDetInputs",
        meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor"),
    ),
]
train_dataloader = dict(batch_size=8, num_workers=2, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(batch_size=8, num_workers=2, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

train_cfg = dict(max_epochs=20, val_interval=2)
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type="AdamW", lr=2e-4, weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
    clip_grad=dict(max_norm=10.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=100),
    # over all epochs, however many train_cfg has
    dict(type="CosineAnnealingLR", eta_min=2e-6, by_epoch=True, convert_to_iter_based=True),
]
auto_scale_lr = dict(base_batch_size=8)
default_hooks = dict(checkpoint=dict(interval=2, max_keep_ckpts=2, save_best="coco/bbox_mAP"))
