"""RetinaNet: each process divides its losses by its own count of positive anchors."""

_base_ = ["base.py"]
model = dict(
    type="RetinaNet",
    backbone=dict(norm_eval=True),
    neck=dict(type="FPN", out_channels=16, num_outs=2),
    bbox_head=dict(
        type="RetinaHead",
        num_classes=10,
        in_channels=16,
        feat_channels=16,
        stacked_convs=1,
        norm_cfg=dict(type="GN", num_groups=4),
        anchor_generator=dict(
            type="AnchorGenerator", ratios=[1.0, 1.6], octave_base_scale=2, scales_per_octave=2, strides=[8, 16]
        ),
    ),
    train_cfg=dict(
        assigner=dict(type="MaxIoUAssigner", pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0, ignore_iof_thr=-1),
        sampler=dict(type="PseudoSampler"),
        allowed_border=-1,
        pos_weight=-1,
        debug=False,
    ),
)
