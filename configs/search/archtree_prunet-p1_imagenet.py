"""Archtree on ImageNet (data/imagenet/{train,val}/<class>/) from prunet_p1 and its published weights, 8 GPUs.

Published is the search over pruned networks in a tree, with latency measured on the device as it goes. Ours: the
numbers of survivors and children, epochs and learning rates; the recipe was not run at full size here.

    torchrun --nproc_per_node 8 tools/search.py configs/search/archtree_prunet-p1_imagenet.py --launcher pytorch \\
        --target-ms 0.8 --amp
"""

_base_ = ["../_base_/search_imagenet.py"]

model = dict(type="MaskedClassifier", arch="prunet_p1", weights="prunet://prunet_p1", step=32, label_smoothing=0.1)
train_cfg = dict(max_epochs=30, strategy=dict(type="Archtree", beam=4, children=4, pretrain=0.0))
optim_wrapper = dict(optimizer=dict(lr=0.05))
param_scheduler = [dict(type="CosineAnnealingLR", T_max=30, by_epoch=True, convert_to_iter_based=True)]
