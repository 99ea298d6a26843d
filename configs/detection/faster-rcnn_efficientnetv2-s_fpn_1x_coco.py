"""Faster R-CNN + FPN with EfficientNetV2-S on COCO, 12 epochs on 8 GPUs × 2 images, mixed precision."""

_base_ = "../_base_/detectors/faster-rcnn_fpn_1x_coco.py"

model = dict(
    data_preprocessor=dict(mean=[127.5, 127.5, 127.5], std=[127.5, 127.5, 127.5]),
    backbone=dict(type="TimmBackbone", model_name="tf_efficientnetv2_s.in1k", pretrained=True),
)
