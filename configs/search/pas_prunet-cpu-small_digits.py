"""Pruning-as-Search on the built-in digits from the largest network of prunet_cpu_small.

python tools/search.py configs/search/pas_prunet-cpu-small_digits.py --target-ms 0.07

The network is trained first (a third of the epochs), then its masks are too (a third), then it is fine-tuned. Published
are masks, straight-through gradient and the two phases that begin with trained weights; these shares are ours, and so
is how the target is met: by the multiplier, not by the published loss.
"""

_base_ = ["../_base_/search_digits.py"]

model = dict(type="MaskedClassifier", space="prunet_cpu_small", num_classes=10)
train_cfg = dict(strategy=dict(type="PruningAsSearch", pretrain=0.33, finetune=0.33))
