"""gpunet_0 on ImageNet at 320 px: torchrun --nproc_per_node 8 tools/train.py CONFIG --launcher pytorch --amp.

Published (train_params of NVIDIA's GPUNet release): size, crop, 8 × 192 images, learning rate 0.06, no distillation,
and what the base says. Ours: what the base calls ours, and warm-up from 7.5e-7 instead of 1e-6.
"""

_base_ = ["../_base_/default_runtime.py", "../_base_/imagenet.py", "../_base_/imagenet_rmsprop_450e.py"]

model = dict(
    type="PruNetClassifier",
    arch="gpunet_0",
    num_classes=1000,
    drop_rate=0.3,
    drop_path_rate=0.2,
    label_smoothing=0.1,
)
transform = dict(size=320, crop_pct=1.0)
train_dataloader = dict(batch_size=192, dataset=dict(transform=transform))
val_dataloader = dict(dataset=dict(transform=transform))
test_dataloader = val_dataloader
optim_wrapper = dict(optimizer=dict(lr=0.06))
auto_scale_lr = dict(enable=False, base_batch_size=1536)
