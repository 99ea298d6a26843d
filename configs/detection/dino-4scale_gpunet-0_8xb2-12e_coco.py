"""DINO with 4 scales with gpunet_0 on COCO, 12 epochs on 8 GPUs × 2 images, mixed precision."""

_base_ = "../_base_/detectors/dino-4scale_8xb2-12e_coco.py"

model = dict(
    backbone=dict(
        type="PruNet",
        arch="gpunet_0",
        init_cfg=dict(type="Pretrained", checkpoint="prunet://gpunet_0"),
    ),
)
