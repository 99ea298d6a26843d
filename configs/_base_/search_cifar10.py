"""Search on CIFAR-10 in data/cifar10/{train,test}/<class>/ for one CPU thread, 40 epochs. A config adds the rest."""

_base_ = ["./search_digits.py"]

data_root = "data/cifar10"
loader = dict(
    batch_size=128, num_workers=2, persistent_workers=False, drop_last=True,
    sampler=dict(type="DefaultSampler", shuffle=True), collate_fn=dict(type="default_collate"),
)  # fmt: skip
images = dict(_delete_=True, type="ImageFolderDataset", data_root=data_root, transform=dict(type="cifar"))
train_dataloader = dict(**loader, dataset=dict(**images, split="train", part="weights"))
train_cfg = dict(
    max_epochs=40,
    arch_dataloader=dict(**loader, dataset=dict(**images, split="train", part="arch")),
    val_dataloader=dict(batch_size=256, num_workers=2, dataset=dict(**images, split="test")),
)
param_scheduler = dict(T_max=40)
