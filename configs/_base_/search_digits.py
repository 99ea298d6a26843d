"""Search on the built-in digits for one CPU thread: two parts, 16 epochs, AdamW. A config adds the rest."""

_base_ = ["./search_runtime.py"]

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
    latency=dict(backend="onnxruntime", threads=1),
)  # fmt: skip
optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="AdamW", lr=3e-3, weight_decay=0.02))
param_scheduler = dict(type="CosineAnnealingLR", T_max=16, eta_min=3e-4, by_epoch=True, convert_to_iter_based=True)
