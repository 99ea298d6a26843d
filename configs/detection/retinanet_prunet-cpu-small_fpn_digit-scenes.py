"""RetinaNet on digit scenes with a network of the middle of the space prunet_cpu_small, for two CPU cores.

Give the searched network and its classification weights: ``--arch spec.json --weights weights.safetensors``.
"""

_base_ = [
    "../_base_/retinanet_small_fpn.py",
    "../_base_/scenes_detection.py",
    "mmdet::_base_/default_runtime.py",
]
custom_imports = dict(imports=["prunet_zoo"], allow_failed_imports=False)

model = dict(backbone=dict(arch="{{fileDirname}}/../classification/prunet-cpu-small.json"))

max_epochs = 5
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=max_epochs, val_interval=max_epochs)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=2e-3, weight_decay=0.05),
    clip_grad=dict(max_norm=10.0),
)
param_scheduler = [
    dict(type="OneCycleLR", eta_max=2e-3, total_steps=max_epochs, pct_start=0.25, convert_to_iter_based=True),
]
auto_scale_lr = dict(enable=False, base_batch_size=8)
randomness = dict(seed=0)
