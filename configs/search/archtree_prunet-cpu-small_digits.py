"""Archtree on the built-in digits from the largest network of prunet_cpu_small.

python tools/search.py configs/search/archtree_prunet-cpu-small_digits.py --target-ms 0.07

Published is the search over pruned networks in a tree, with latency measured on the device as it goes. Ours: four
survivors with four children each, and the shares of the epochs (half to train first, the rest to fine-tune).
"""

_base_ = ["../_base_/search_digits.py"]

model = dict(type="MaskedClassifier", space="prunet_cpu_small", num_classes=10)
train_cfg = dict(strategy=dict(type="Archtree", beam=4, children=4, pretrain=0.5))
