"""A network of the middle of the space prunet_cpu_small on CIFAR-10 (data/cifar10/{train,test}); small enough for CPU.

Give a searched network with ``--arch spec.json``.
"""

_base_ = ["../_base_/default_runtime.py", "../_base_/cifar10.py"]

model = dict(type="PruNetClassifier", arch="{{fileDirname}}/prunet-cpu-small.json", num_classes=10, label_smoothing=0.1)

max_epochs = 60
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=max_epochs, val_interval=1)
optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="AdamW", lr=4e-3, weight_decay=0.05))
param_scheduler = [
    dict(type="OneCycleLR", eta_max=4e-3, total_steps=max_epochs, pct_start=0.2, convert_to_iter_based=True),
]
auto_scale_lr = dict(enable=False, base_batch_size=128)
