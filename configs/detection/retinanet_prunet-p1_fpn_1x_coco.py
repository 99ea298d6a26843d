"""RetinaNet + FPN with prunet_p1 on COCO, 8 GPUs × 2 images; mixed precision with ``--amp``."""

_base_ = "../_base_/retinanet_prunet_coco_1x.py"
model = dict(backbone=dict(arch="prunet_p1", init_cfg=dict(type="Pretrained", checkpoint="prunet://prunet_p1")))
