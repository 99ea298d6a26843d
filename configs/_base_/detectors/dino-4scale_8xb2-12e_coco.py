"""DINO with 4 scales on COCO, 12 epochs on 8 GPUs × 2 images, mixed precision; a config on top names the backbone.

With ResNet-50 it is mmdet's own config but for mixed precision.
"""

_base_ = "mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py"
custom_imports = dict(imports=["prunet_zoo"], allow_failed_imports=False)

model = dict(
    backbone=dict(
        _delete_=True,
        out_indices=(2, 3, 4),  # strides 8, 16, 32; neck.in_channels follows
        frozen_stages=1,
        norm_cfg=dict(type="BN", requires_grad=False),
        norm_eval=True,
    ),
)
# mmdet's paramwise_cfg, a tenth of the learning rate for all names with 'backbone', holds for every backbone
optim_wrapper = dict(type="AmpOptimWrapper")
auto_scale_lr = dict(enable=False, base_batch_size=16)
