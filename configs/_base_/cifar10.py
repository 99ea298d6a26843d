"""CIFAR-10 in folders: data/cifar10/train/<class>/, data/cifar10/test/<class>/. Random crop and flip at 32 px."""

data_root = "data/cifar10"
transform = dict(type="cifar", size=32, pad=4)

train_dataloader = dict(
    batch_size=128,
    num_workers=0,
    drop_last=True,
    sampler=dict(type="DefaultSampler", shuffle=True),
    collate_fn=dict(type="default_collate"),
    dataset=dict(type="ImageFolderDataset", data_root=data_root, split="train", transform=transform),
)
val_dataloader = dict(
    batch_size=500,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="default_collate"),
    dataset=dict(type="ImageFolderDataset", data_root=data_root, split="test", transform=transform),
)
test_dataloader = val_dataloader
