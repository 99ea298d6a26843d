"""What the small detectors of these tests share: digit scenes at $SCENES, a few epochs, no random transforms."""

_base_ = ["../../../configs/_base_/scenes_detection.py", "mmdet::_base_/default_runtime.py"]
custom_imports = dict(imports=["prunet_zoo"], allow_failed_imports=False)
data_root = "{{$SCENES:data/digit_scenes}}/"
plain_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape")),
]
train_dataloader = dict(batch_size=2, dataset=dict(data_root=data_root, pipeline=plain_pipeline))
val_dataloader = dict(batch_size=2, dataset=dict(data_root=data_root))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + "annotations/instances_val.json")
test_evaluator = val_evaluator
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=2, val_interval=1)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="SGD", lr=0.01, momentum=0.9))
param_scheduler = [dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=6)]
randomness = dict(seed=0)
log_level = "WARNING"
model = dict(
    data_preprocessor=dict(
        type="DetDataPreprocessor", mean=[127.5] * 3, std=[64.0] * 3, bgr_to_rgb=True, pad_size_divisor=16
    ),
    backbone=dict(type="PruNet", arch="{{fileDirname}}/tiny.json", out_indices=(2, 3)),
    test_cfg=dict(nms_pre=100, min_bbox_size=0, score_thr=0.0, nms=dict(type="nms", iou_threshold=0.6), max_per_img=30),
)
