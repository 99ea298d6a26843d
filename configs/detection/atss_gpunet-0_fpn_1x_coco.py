"""ATSS + FPN with gpunet_0 on COCO, 12 epochs on 8 GPUs × 2 images, mixed precision."""

_base_ = "../_base_/detectors/atss_fpn_1x_coco.py"

model = dict(
    backbone=dict(
        type="PruNet",
        arch="gpunet_0",
        init_cfg=dict(type="Pretrained", checkpoint="prunet://gpunet_0"),
    ),
)
