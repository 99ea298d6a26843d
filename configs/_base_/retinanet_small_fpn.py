"""RetinaNet + FPN for small images on CPU: strides 8 and 16, 64 channels, two stacked convolutions."""

model = dict(
    type="RetinaNet",
    data_preprocessor=dict(
        type="DetDataPreprocessor",
        mean=[127.5, 127.5, 127.5],
        std=[63.75, 63.75, 63.75],
        bgr_to_rgb=True,
        pad_size_divisor=16,
    ),
    backbone=dict(type="PruNet", arch="prunet_p0", out_indices=(2, 3)),
    neck=dict(type="FPN", out_channels=64, num_outs=2),
    bbox_head=dict(
        type="RetinaHead",
        num_classes=10,
        in_channels=64,
        stacked_convs=2,
        feat_channels=64,
        norm_cfg=dict(type="GN", num_groups=8),
        anchor_generator=dict(
            type="AnchorGenerator",
            octave_base_scale=2,  # sides of 16, 20, 25, 32, 40 and 51 px
            scales_per_octave=3,
            ratios=[1.0, 1.6, 2.6],  # height / width: digits are taller than wide
            strides=[8, 16],
        ),
        bbox_coder=dict(type="DeltaXYWHBBoxCoder", target_means=[0.0] * 4, target_stds=[1.0] * 4),
        reg_decoded_bbox=True,
        loss_cls=dict(type="FocalLoss", use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0),
        loss_bbox=dict(type="GIoULoss", loss_weight=2.0),
    ),
    train_cfg=dict(
        assigner=dict(type="MaxIoUAssigner", pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0, ignore_iof_thr=-1),
        sampler=dict(type="PseudoSampler"),
        allowed_border=-1,
        pos_weight=-1,
        debug=False,
    ),
    test_cfg=dict(
        nms_pre=300, min_bbox_size=0, score_thr=0.05, nms=dict(type="nms", iou_threshold=0.5), max_per_img=50
    ),
)
