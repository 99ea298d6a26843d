"""RetinaNet + FPN on COCO, 12 epochs on 8 GPUs × 2 images, mixed precision; a config on top names the backbone."""

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
train_dataloader = dict(batch_size=2, num_workers=4)
optim_wrapper = dict(type="AmpOptimWrapper", clip_grad=dict(max_norm=35, norm_type=2))
auto_scale_lr = dict(enable=False, base_batch_size=16)
