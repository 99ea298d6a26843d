"""ATSS + FPN on COCO, 12 epochs on 8 GPUs × 2 images, mixed precision; a config on top names the backbone.

With ResNet-50 it is mmdet's own config but for mixed precision.
"""

_base_ = "mmdet::atss/atss_r50_fpn_1x_coco.py"
custom_imports = dict(imports=["prunet_zoo"], allow_failed_imports=False)

model = dict(
    backbone=dict(
        _delete_=True,
        out_indices=(1, 2, 3, 4),  # strides 4, 8, 16, 32; neck.in_channels follows
        frozen_stages=1,
        norm_cfg=dict(type="BN", requires_grad=True),
        norm_eval=True,
    ),
)
optim_wrapper = dict(type="AmpOptimWrapper")
auto_scale_lr = dict(enable=False, base_batch_size=16)
