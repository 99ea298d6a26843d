"""Archtree on ImageNet (data/imagenet/{train,val}/<class>/) from timm's ResNet-50 and its weights, 8 GPUs.

Published is the search over pruned networks in a tree, with latency measured on the device as it goes. Ours: the
numbers of survivors and children, epochs and learning rates; the recipe was not run at full size here. Needs torch-
pruning: pip install 'prunet-zoo[prune]'.

    torchrun --nproc_per_node 8 tools/search.py configs/search/archtree_resnet50_imagenet.py --launcher pytorch \\
        --target-ms 1.0 --amp
"""

_base_ = ["../_base_/search_imagenet.py"]

model = dict(
    type="MaskedClassifier", timm="resnet50", pretrained=True, num_classes=1000, input_size=224, step=8,
    label_smoothing=0.1,
)  # fmt: skip
train_cfg = dict(max_epochs=30, strategy=dict(type="Archtree", beam=4, children=4, pretrain=0.0))
optim_wrapper = dict(optimizer=dict(lr=0.05))
param_scheduler = [dict(type="CosineAnnealingLR", T_max=30, by_epoch=True, convert_to_iter_based=True)]
