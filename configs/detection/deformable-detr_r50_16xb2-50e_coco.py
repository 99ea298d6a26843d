"""Deformable DETR with ResNet-50 on COCO, 50 epochs on 16 GPUs × 2 images, mixed precision."""

_base_ = "../_base_/detectors/deformable-detr_16xb2-50e_coco.py"

model = dict(
    backbone=dict(
        type="ResNet",
        depth=50,
        out_indices=(1, 2, 3),  # ResNet's count begins at stride 4
        style="pytorch",
        init_cfg=dict(type="Pretrained", checkpoint="torchvision://resnet50"),
    ),
)
