"""Archtree on the built-in digits from the largest network of prunet_cpu_small.

python tools/search.py configs/search/archtree_prunet-cpu-small_digits.py --target-ms 0.07

Published is the search over pruned networks in a tree, with latency measured on the device as it goes. Ours, smaller
than the class's own settings so that it is over in minutes: two survivors with two children each, ten steps of
recovery, a removal of up to half of a group; and the shares of the epochs (half to train first, the rest to fine-tune).
"""

_base_ = ["../_base_/search_digits.py"]

model = dict(type="MaskedClassifier", space="prunet_cpu_small", num_classes=10)
train_cfg = dict(
    strategy=dict(type="Archtree", beam=2, children=2, rounds=6, removal=0.5, recovery_steps=10, pretrain=0.5)
)
