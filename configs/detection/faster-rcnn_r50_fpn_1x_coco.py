"""Faster R-CNN + FPN with ResNet-50 on COCO, 12 epochs on 8 GPUs × 2 images, mixed precision."""

_base_ = "../_base_/detectors/faster-rcnn_fpn_1x_coco.py"

model = dict(
    backbone=dict(
        type="ResNet",
        depth=50,
        out_indices=(0, 1, 2, 3),  # ResNet's count begins at stride 4
        style="pytorch",
        init_cfg=dict(type="Pretrained", checkpoint="torchvision://resnet50"),
    ),
)
