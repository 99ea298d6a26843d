"""DINO with 4 scales with ResNet-50 on COCO, 12 epochs on 8 GPUs × 2 images, mixed precision."""

_base_ = "../_base_/detectors/dino-4scale_8xb2-12e_coco.py"

model = dict(
    backbone=dict(
        type="ResNet",
        depth=50,
        out_indices=(1, 2, 3),  # ResNet's count begins at stride 4
        style="pytorch",
        init_cfg=dict(type="Pretrained", checkpoint="torchvision://resnet50"),
    ),
)
