"""prunet_p1 on ImageNet: bash tools/dist_train.sh CONFIG 8 --amp, or torchrun --nproc_per_node 8 tools/train.py CONFIG ..."""

_base_ = ["../_base_/default_runtime.py", "../_base_/imagenet.py", "../_base_/imagenet_rmsprop_450e.py"]

model = dict(
    type="PruNetClassifier",
    arch="prunet_p1",
    num_classes=1000,
    drop_rate=0.3,
    drop_path_rate=0.2,
    label_smoothing=0.1,
)
