"""DDPNAS in the space prunet_cpu_small on the built-in digits, for this machine's CPU (one thread).

python tools/search.py configs/search/ddpnas_prunet-cpu-small_digits.py --target-ms 0.07

Published: sampling, both updates; T = 3 passes there, 2 here. Ours: two widths a block, the warm-up, and passes of some
steps where the published ones are whole epochs: 90 epochs give each of the 70 sub-networks 23 steps.
"""

_base_ = ["../_base_/search_digits.py"]

model = dict(type="SuperNetClassifier", space="prunet_cpu_small", num_classes=10)
train_cfg = dict(max_epochs=90, strategy=dict(type="DDPNAS", passes=2, widths=2, warmup=0.2))
param_scheduler = dict(T_max=90)
