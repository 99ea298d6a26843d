"""RetinaNet + FPN with EfficientNet-B1 on COCO, 12 epochs on 8 GPUs × 2 images, mixed precision."""

_base_ = "../_base_/detectors/retinanet_fpn_1x_coco.py"

model = dict(
    backbone=dict(type="TimmBackbone", model_name="efficientnet_b1.ft_in1k", pretrained=True),
)
