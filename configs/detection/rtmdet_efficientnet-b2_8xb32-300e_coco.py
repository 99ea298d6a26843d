"""RTMDet with EfficientNet-B2 on COCO, 300 epochs on 8 GPUs × 32 images, mixed precision."""

_base_ = "../_base_/detectors/rtmdet_8xb32-300e_coco.py"

model = dict(
    backbone=dict(type="TimmBackbone", model_name="efficientnet_b2.ra_in1k", pretrained=True),
)
