"""Search on ImageNet in data/imagenet/{train,val}/<class>/ with 8 GPUs × 64 images: SGD, 90 epochs, latency of the GPU.

Epochs and learning rates are ours: the publications' recipes were not at hand. A config adds model and strategy.
"""

_base_ = ["./search_runtime.py"]

data_root = "data/imagenet"
loader = dict(
    batch_size=64, num_workers=8, persistent_workers=False, drop_last=True,
    sampler=dict(type="DefaultSampler", shuffle=True), collate_fn=dict(type="default_collate"),
)  # fmt: skip
images = dict(type="ImageFolderDataset", data_root=data_root, transform=dict(type="imagenet"))
train_dataloader = dict(**loader, dataset=dict(**images, split="train", part="weights"))
train_cfg = dict(
    type="SearchLoop",
    max_epochs=90,
    arch_dataloader=dict(**loader, dataset=dict(**images, split="train", part="arch")),
    val_dataloader=dict(
        batch_size=128, num_workers=8, sampler=dict(type="DefaultSampler", shuffle=False),
        collate_fn=dict(type="default_collate"), dataset=dict(**images, split="val"),
    ),
    latency=dict(backend="torch", accelerator="cuda", dtype="fp16", threads=1),
    recalibration_batches=200,
)  # fmt: skip
optim_wrapper = dict(
    type="OptimWrapper", optimizer=dict(type="SGD", lr=0.4, momentum=0.9, nesterov=True, weight_decay=2e-5)
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, begin=0, end=5, by_epoch=True, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", T_max=85, begin=5, end=90, by_epoch=True, convert_to_iter_based=True),
]
auto_scale_lr = dict(enable=False, base_batch_size=512)
