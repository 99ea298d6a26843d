"""Tiered pruning in the space prunet_cpu_small on the built-in digits, for this machine's CPU (one thread).

python tools/search.py configs/search/tiered_prunet-cpu-small_digits.py --target-ms 0.07

Without a target: a third of the way from the fastest to the slowest network of the space on this machine.
"""

_base_ = ["../_base_/search_digits.py"]

model = dict(type="SuperNetClassifier", space="prunet_cpu_small", num_classes=10)
train_cfg = dict(strategy=dict(type="TieredPruning", warmup=0.2, lr=0.04, dual_lr=0.03, active=2))
