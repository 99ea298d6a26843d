"""The built-in digit scans: 1,438 for training, 359 for testing, 32 px. Nothing is downloaded."""

train_dataloader = dict(
    batch_size=64,
    num_workers=0,
    drop_last=True,
    sampler=dict(type="DefaultSampler", shuffle=True),
    collate_fn=dict(type="default_collate"),
    dataset=dict(type="DigitsDataset", split="train", transform=dict(type="digits")),
)
val_dataloader = dict(
    batch_size=120,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="default_collate"),
    dataset=dict(type="DigitsDataset", split="test", transform=dict(type="digits")),
)
test_dataloader = val_dataloader
