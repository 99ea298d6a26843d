"""prunet_p1 on ImageNet: torchrun --nproc_per_node 8 tools/train.py CONFIG --launcher pytorch --amp."""

_base_ = ["../_base_/default_runtime.py", "../_base_/imagenet.py", "../_base_/imagenet_rmsprop_450e.py"]

model = dict(
    type="PruNetClassifier",
    arch="prunet_p1",
    num_classes=1000,
    drop_rate=0.3,
    drop_path_rate=0.2,
    label_smoothing=0.1,
)
