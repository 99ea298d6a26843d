"""Pruning-as-Search on CIFAR-10 (data/cifar10/{train,test}/<class>/) from the largest network of rep_vgg_small.

python tools/search.py configs/search/pas_rep-vgg-small_cifar10.py

Each layer has a width of its own, and what a layer costs depends on the width before it, so there is no latency table:
the start network is measured, others are taken in proportion to their MACs, and those proposed at the end are measured.
``train_cfg.latency.type=macs`` counts instead. The shares of the epochs are ours, and so is
how the target is met: by the multiplier, not by the published loss.
"""

_base_ = ["../_base_/search_cifar10.py"]

model = dict(type="MaskedClassifier", space="rep_vgg_small", num_classes=10)
train_cfg = dict(strategy=dict(type="PruningAsSearch", pretrain=0.33, finetune=0.33))
