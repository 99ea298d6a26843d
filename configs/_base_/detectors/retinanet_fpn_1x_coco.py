"""RetinaNet + FPN on COCO, 12 epochs on 8 GPUs × 2 images, mixed precision; a config on top names the backbone.

With ResNet-50 it differs from mmdet's own config by mixed precision and by where the extra levels come from (neck).
"""

_base_ = "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py"
custom_imports = dict(imports=["prunet_zoo"], allow_failed_imports=False)

model = dict(
    backbone=dict(
        _delete_=True,
        out_indices=(1, 2, 3, 4),  # strides 4, 8, 16, 32; neck.in_channels follows
        frozen_stages=1,
        norm_cfg=dict(type="BN", requires_grad=True),
        norm_eval=True,
    ),
    # FPN starts at stride 8 (start_level=1), as in mmdet; extra levels come from its own last map, because the last
    # map of some networks is wide (PruNet-P0: 704 channels) and 'on_input' would spend 1.6 M parameters on one
    # convolution
    neck=dict(add_extra_convs="on_output"),
)
optim_wrapper = dict(type="AmpOptimWrapper")
auto_scale_lr = dict(enable=False, base_batch_size=16)
