"""Digit scenes (128 px, COCO format): data, evaluation. `tools/train.py` makes them when they are missing."""

dataset_type = "CocoDataset"
data_root = "data/digit_scenes/"
metainfo = dict(classes=("0", "1", "2", "3", "4", "5", "6", "7", "8", "9"))
backend_args = None

# no flips and no turns: a mirrored 2 is not a digit, and boxes of turned digits are not tight
train_pipeline = [
    dict(type="LoadImageFromFile", backend_args=backend_args),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(
        type="RandomAffine",
        max_rotate_degree=0.0,
        max_shear_degree=0.0,
        max_translate_ratio=0.04,
        scaling_ratio_range=(0.9, 1.05),
        border_val=(114, 114, 114),
    ),
    dict(type="PhotoMetricDistortion"),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape")),
]
test_pipeline = [
    dict(type="LoadImageFromFile", backend_args=backend_args),
    # gives the scale_factor that mmdet wants back; 128 px stay 128 px
    dict(type="Resize", scale=(128, 128), keep_ratio=True),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        metainfo=metainfo,
        ann_file="annotations/instances_train.json",
        data_prefix=dict(img="images/train/"),
        filter_cfg=dict(filter_empty_gt=True),
        pipeline=train_pipeline,
        backend_args=backend_args,
    ),
)
val_dataloader = dict(
    batch_size=16,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        metainfo=metainfo,
        ann_file="annotations/instances_val.json",
        data_prefix=dict(img="images/val/"),
        test_mode=True,
        pipeline=test_pipeline,
        backend_args=backend_args,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="CocoMetric", ann_file=data_root + "annotations/instances_val.json", metric="bbox")
test_evaluator = val_evaluator
