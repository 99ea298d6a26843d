"""DDPNAS in the space prunet_cpu_small on the built-in digits, for this machine's CPU (one thread).

python tools/search.py configs/search/ddpnas_prunet-cpu-small_digits.py --target-ms 0.07

Published: sampling, both updates, T = 3 passes. Ours: two widths a block, and passes of some steps where the published
ones are whole epochs.
"""

_base_ = ["../_base_/search_digits.py"]

model = dict(type="SuperNetClassifier", space="prunet_cpu_small", num_classes=10)
train_cfg = dict(strategy=dict(type="DDPNAS", passes=3, widths=2, warmup=0.2))
