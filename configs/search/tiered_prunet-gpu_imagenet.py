"""Tiered pruning in the space prunet_gpu on ImageNet (data/imagenet/{train,val}/<class>/), 8 GPUs.

The target is of the device that the table is from: measure one with `tools/latency.py table prunet_gpu`, give it with
--table. Epochs, learning rates and thresholds are ours (the publication's were not at hand); the recipe was not run at
full size here.

    torchrun --nproc_per_node 8 tools/search.py configs/search/tiered_prunet-gpu_imagenet.py --launcher pytorch \\
        --table v100.jsonl --target-ms 2.0 --amp
"""

_base_ = ["../_base_/search_runtime.py"]

data_root = "data/imagenet"
model = dict(type="SuperNetClassifier", space="prunet_gpu", num_classes=1000, label_smoothing=0.1)
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
    strategy=dict(type="TieredPruning", target=2.0, warmup=0.2, lr=0.01, dual_lr=0.001, active=2),
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
