"""Cascade R-CNN + FPN with prunet_p1 on COCO, 12 epochs on 8 GPUs × 2 images, mixed precision."""

_base_ = "../_base_/detectors/cascade-rcnn_fpn_1x_coco.py"

model = dict(
    backbone=dict(
        type="PruNet",
        arch="prunet_p1",
        init_cfg=dict(type="Pretrained", checkpoint="prunet://prunet_p1"),
    ),
)
