"""Tiered pruning in the space prunet_gpu on ImageNet (data/imagenet/{train,val}/<class>/), 8 GPUs.

The target is of the device that the table is from: measure one with `tools/latency.py table prunet_gpu`, give it with
--table. Epochs, learning rates and thresholds are ours (the publication's were not at hand); the recipe was not run at
full size here.

    torchrun --nproc_per_node 8 tools/search.py configs/search/tiered_prunet-gpu_imagenet.py --launcher pytorch \\
        --table v100.jsonl --target-ms 2.0 --amp
"""

_base_ = ["../_base_/search_imagenet.py"]

model = dict(type="SuperNetClassifier", space="prunet_gpu", num_classes=1000, label_smoothing=0.1)
train_cfg = dict(strategy=dict(type="TieredPruning", target=2.0, warmup=0.2, lr=0.01, dual_lr=0.001, active=2))
