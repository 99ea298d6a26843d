"""RTMDet with gpunet_0 on COCO, 300 epochs on 8 GPUs × 32 images, mixed precision."""

_base_ = "../_base_/detectors/rtmdet_8xb32-300e_coco.py"

model = dict(
    backbone=dict(
        type="PruNet",
        arch="gpunet_0",
        init_cfg=dict(type="Pretrained", checkpoint="prunet://gpunet_0"),
    ),
)
