"""Pruning-as-Search on ImageNet (data/imagenet/{train,val}/<class>/) from timm's ResNet-50 and its weights, 8 GPUs.

Published: the loss (multiplier=False, M* the target from the start) with α = 5 for M in 10⁹ multiply-accumulates,
which is 84 on the scale of the start network, and a quarter of them left as the hardest setting. Ours: epochs and
learning rates; the recipe was not run at full size here. Needs torch-pruning: pip install 'prunet-zoo[prune]'.

    torchrun --nproc_per_node 8 tools/search.py configs/search/pas_resnet50_imagenet.py --launcher pytorch --amp
"""

_base_ = ["../_base_/search_imagenet.py"]

model = dict(
    type="MaskedClassifier", timm="resnet50", pretrained=True, num_classes=1000, input_size=224, step=8,
    label_smoothing=0.1,
)  # fmt: skip
train_cfg = dict(
    strategy=dict(
        type="PruningAsSearch", target=1022.0, multiplier=False, alpha=84.0, ramp=0.0, pretrain=0.0, finetune=0.5
    ),
    latency=dict(_delete_=True, type="macs"),
)
optim_wrapper = dict(optimizer=dict(lr=0.05))
