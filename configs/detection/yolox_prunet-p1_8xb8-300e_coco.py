"""YOLOX with prunet_p1 on COCO, 300 epochs on 8 GPUs × 8 images, mixed precision."""

_base_ = "../_base_/detectors/yolox_8xb8-300e_coco.py"

model = dict(
    backbone=dict(
        type="PruNet",
        arch="prunet_p1",
        init_cfg=dict(type="Pretrained", checkpoint="prunet://prunet_p1"),
    ),
)
