"""Deformable DETR with EfficientNet-B2 on COCO, 50 epochs on 16 GPUs × 2 images, mixed precision."""

_base_ = "../_base_/detectors/deformable-detr_16xb2-50e_coco.py"

model = dict(
    backbone=dict(type="TimmBackbone", model_name="efficientnet_b2.ra_in1k", pretrained=True),
)
