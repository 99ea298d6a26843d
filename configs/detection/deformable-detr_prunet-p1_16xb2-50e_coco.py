"""Deformable DETR with prunet_p1 on COCO, 50 epochs on 16 GPUs × 2 images, mixed precision."""

_base_ = "../_base_/detectors/deformable-detr_16xb2-50e_coco.py"

model = dict(
    backbone=dict(
        type="PruNet",
        arch="prunet_p1",
        init_cfg=dict(type="Pretrained", checkpoint="prunet://prunet_p1"),
    ),
)
