"""ATSS: its losses are divided by counts that `reduce_mean` averages over the processes."""

_base_ = ["base.py"]
model = dict(
    type="ATSS",
    backbone=dict(norm_eval=True),
    neck=dict(type="FPN", out_channels=16, num_outs=2),
    bbox_head=dict(
        type="ATSSHead",
        num_classes=10,
        in_channels=16,
        feat_channels=16,
        stacked_convs=1,
        norm_cfg=dict(type="GN", num_groups=4),
        anchor_generator=dict(
            type="AnchorGenerator", ratios=[1.0], octave_base_scale=4, scales_per_octave=1, strides=[8, 16]
        ),
        bbox_coder=dict(type="DeltaXYWHBBoxCoder", target_means=[0.0] * 4, target_stds=[0.1, 0.1, 0.2, 0.2]),
        loss_bbox=dict(type="GIoULoss", loss_weight=2.0),
    ),
    train_cfg=dict(assigner=dict(type="ATSSAssigner", topk=9), allowed_border=-1, pos_weight=-1, debug=False),
)
