"""FCOS + FPN on COCO, 12 epochs on 8 GPUs × 2 images, mixed precision; a config on top names the backbone.

With ResNet-50 it differs from mmdet's own (fcos_r50-caffe_fpn_gn-head_1x) by mixed precision, and by torchvision's
weights, network (style) and preprocessing in the place of Caffe's.
"""

_base_ = "mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py"
custom_imports = dict(imports=["prunet_zoo"], allow_failed_imports=False)

model = dict(
    # mmdet's own is for Caffe's ResNet
    data_preprocessor=dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True),
    backbone=dict(
        _delete_=True,
        out_indices=(1, 2, 3, 4),  # strides 4, 8, 16, 32; neck.in_channels follows
        frozen_stages=1,
        norm_cfg=dict(type="BN", requires_grad=False),
        norm_eval=True,
    ),
)
optim_wrapper = dict(type="AmpOptimWrapper")
auto_scale_lr = dict(enable=False, base_batch_size=16)
