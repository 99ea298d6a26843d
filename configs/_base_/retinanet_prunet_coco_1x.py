"""RetinaNet + FPN on COCO, 12 epochs, as mmdet's ResNet baselines; a config on top names the network."""

_base_ = [
    "mmdet::_base_/models/retinanet_r50_fpn.py",
    "mmdet::_base_/datasets/coco_detection.py",
    "mmdet::_base_/schedules/schedule_1x.py",
    "mmdet::_base_/default_runtime.py",
]
custom_imports = dict(imports=["prunet_zoo"], allow_failed_imports=False)

model = dict(
    backbone=dict(
        _delete_=True,
        type="PruNet",
        arch="prunet_p0",
        out_indices=(1, 2, 3, 4),  # strides 4, 8, 16, 32; neck.in_channels follows
        frozen_stages=1,
        norm_cfg=dict(type="BN", requires_grad=True),
        norm_eval=True,
        init_cfg=dict(type="Pretrained", checkpoint="prunet://prunet_p0"),
    ),
    # FPN starts at stride 8 (start_level=1), as in mmdet; extra levels come from its own last map, because the last
    # map of these networks is wide (704 channels) and 'on_input' would spend 1.6 M parameters on one convolution
    neck=dict(add_extra_convs="on_output"),
)
train_dataloader = dict(batch_size=2, num_workers=4)
optim_wrapper = dict(
    optimizer=dict(type="SGD", lr=0.01, momentum=0.9, weight_decay=1e-4),
    clip_grad=dict(max_norm=35, norm_type=2),
)
auto_scale_lr = dict(enable=False, base_batch_size=16)
