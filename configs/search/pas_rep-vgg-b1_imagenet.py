"""Pruning-as-Search on ImageNet (data/imagenet/{train,val}/<class>/) from a network like RepVGG-B1, 8 GPUs.

Published: the loss (multiplier=False, M* the target from the start) with α = 0.1 for M in 10⁹ multiply-accumulates,
which is 14 on the scale of the start network; masks behind the activation of the summed branches. Ours: the target,
epochs and learning rates; the start network is trained here first (half of the epochs), where the publication starts
from trained weights. The recipe was not run at full size here.

    torchrun --nproc_per_node 8 tools/search.py configs/search/pas_rep-vgg-b1_imagenet.py --launcher pytorch --amp
"""

_base_ = ["../_base_/search_imagenet.py"]

model = dict(type="MaskedClassifier", space="rep_vgg_b1", num_classes=1000, label_smoothing=0.1)
train_cfg = dict(
    strategy=dict(
        type="PruningAsSearch", target=6000.0, multiplier=False, alpha=14.0, ramp=0.0, pretrain=0.5, finetune=0.25
    ),
    latency=dict(_delete_=True, type="macs"),
)
