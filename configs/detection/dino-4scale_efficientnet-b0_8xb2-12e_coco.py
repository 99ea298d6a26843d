"""DINO with 4 scales with EfficientNet-B0 on COCO, 12 epochs on 8 GPUs × 2 images, mixed precision."""

_base_ = "../_base_/detectors/dino-4scale_8xb2-12e_coco.py"

model = dict(
    backbone=dict(type="TimmBackbone", model_name="efficientnet_b0.ra_in1k", pretrained=True),
)
