"""ImageNet-1k in folders: data/imagenet/train/<class>/, data/imagenet/val/<class>/. timm's transforms at 224 px.

A config of a network of another size sets ``transform`` of the three dataloaders.
"""

data_root = "data/imagenet"
# published: --aa rand-m9-mstd0.5 --remode pixel --reprob 0.2 --crop-pct 0.875 --img-size 224, and for evaluation
# bicubic, mean and std. Bicubic for training is ours.
transform = dict(
    type="imagenet",
    size=224,
    crop_pct=0.875,
    interpolation="bicubic",
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    auto_augment="rand-m9-mstd0.5",
    re_prob=0.2,
)

train_dataloader = dict(
    batch_size=256,  # published: -b 256 on each of 8 GPUs
    num_workers=8,
    persistent_workers=True,
    pin_memory=True,
    drop_last=True,
    sampler=dict(type="DefaultSampler", shuffle=True),
    collate_fn=dict(type="default_collate"),
    dataset=dict(type="ImageFolderDataset", data_root=data_root, split="train", transform=transform),
)
val_dataloader = dict(
    batch_size=64,  # 7.1 GiB at most: gpunet_d2 at 528 px, float32 on CPU, 2026-11-20
    num_workers=8,
    persistent_workers=True,
    pin_memory=True,
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="default_collate"),
    dataset=dict(type="ImageFolderDataset", data_root=data_root, split="val", transform=transform),
)
test_dataloader = val_dataloader
