"""DDPNAS in the space prunet_gpu on ImageNet (data/imagenet/{train,val}/<class>/), 8 GPUs.

T = 3 as published. Ours: the learning rates, four widths a block, and 90 epochs shared out among the passes: with the
published whole epoch a pass, 9 choices a layer take 3·(9 + 8 + … + 2) = 132. The recipe was not run at full size here.

    torchrun --nproc_per_node 8 tools/search.py configs/search/ddpnas_prunet-gpu_imagenet.py --launcher pytorch \\
        --table v100.jsonl --target-ms 2.0 --amp
"""

_base_ = ["../_base_/search_imagenet.py"]

model = dict(type="SuperNetClassifier", space="prunet_gpu", num_classes=1000, label_smoothing=0.1)
train_cfg = dict(strategy=dict(type="DDPNAS", target=2.0, passes=3, widths=4))
