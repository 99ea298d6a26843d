"""Tiered pruning in the space prunet_cpu_small on the built-in digits, for this machine's CPU (one thread).

python tools/search.py configs/search/tiered_prunet-cpu-small_digits.py --target-ms 0.07

Without a target: a third of the way from the fastest to the slowest network of the space on this machine.
"""

_base_ = ["../_base_/search_runtime.py"]

model = dict(type="SuperNetClassifier", space="prunet_cpu_small", num_classes=10)
loader = dict(
    batch_size=48, num_workers=0, drop_last=True, sampler=dict(type="DefaultSampler", shuffle=True),
    collate_fn=dict(type="default_collate"),
)  # fmt: skip
digits = dict(type="DigitsDataset", transform=dict(type="digits"))
train_dataloader = dict(**loader, dataset=dict(**digits, split="train", part="weights"))
train_cfg = dict(
    type="SearchLoop",
    max_epochs=16,
    arch_dataloader=dict(**loader, dataset=dict(**digits, split="train", part="arch")),
    val_dataloader=dict(
        batch_size=120, sampler=dict(type="DefaultSampler", shuffle=False), collate_fn=dict(type="default_collate"),
        dataset=dict(**digits, split="test"),
    ),
    strategy=dict(type="TieredPruning", warmup=0.2, lr=0.04, dual_lr=0.03, active=2),
    latency=dict(backend="onnxruntime", threads=1),
)  # fmt: skip
optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="AdamW", lr=3e-3, weight_decay=0.02))
param_scheduler = dict(type="CosineAnnealingLR", T_max=16, eta_min=3e-4, by_epoch=True, convert_to_iter_based=True)
