"""Mask R-CNN on digit scenes with a network of the middle of the space prunet_cpu_small, for two CPU cores.

Give the network found by any search and its weights: ``--arch spec.json --weights weights.safetensors``.
"""

_base_ = [
    "../_base_/mask-rcnn_small_fpn.py",
    "../_base_/scenes_segmentation.py",
    "../_base_/scenes_schedule_small.py",
    "mmdet::_base_/default_runtime.py",
]
custom_imports = dict(imports=["prunet_zoo"], allow_failed_imports=False)

model = dict(backbone=dict(arch="{{fileDirname}}/../classification/prunet-cpu-small.json"))
