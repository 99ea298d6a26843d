"""Tiered pruning in the space prunet_cpu_small on CIFAR-10 in an image folder (data/cifar10/{train,test}/<class>/).

python tools/search.py configs/search/tiered_prunet-cpu-small_cifar10.py --target-ms 0.07
"""

_base_ = ["../_base_/search_cifar10.py"]

model = dict(type="SuperNetClassifier", space="prunet_cpu_small", num_classes=10)
train_cfg = dict(strategy=dict(type="TieredPruning", warmup=0.2, lr=0.04, dual_lr=0.03, active=2))
