"""Pruning-as-Search on ImageNet (data/imagenet/{train,val}/<class>/) from prunet_p1 and its published weights, 8 GPUs.

Hidden widths may shrink in steps of 32. The target is in ms of this machine's GPU. Published are masks, straight-
through gradient and the two phases; epochs, learning rates and the multiplier that meets the target in the place of the
published loss are ours, and the recipe was not run at full size here.

    torchrun --nproc_per_node 8 tools/search.py configs/search/pas_prunet-p1_imagenet.py --launcher pytorch \\
        --target-ms 0.8 --amp
"""

_base_ = ["../_base_/search_imagenet.py"]

model = dict(type="MaskedClassifier", arch="prunet_p1", weights="prunet://prunet_p1", step=32, label_smoothing=0.1)
train_cfg = dict(strategy=dict(type="PruningAsSearch", pretrain=0.0, finetune=0.5))
optim_wrapper = dict(optimizer=dict(lr=0.05))
