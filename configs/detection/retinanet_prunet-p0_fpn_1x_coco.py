"""RetinaNet + FPN with prunet_p0 on COCO, 8 GPUs × 2 images; mixed precision with ``--amp``."""

_base_ = "../_base_/retinanet_prunet_coco_1x.py"
