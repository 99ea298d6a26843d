"""ImageNet → COCO on a machine with 8 GPUs: data/imagenet/{train,val}/<class>/ and data/coco/ as mmdet lays it out.

python tools/pipeline.py configs/pipeline/imagenet_coco.py --target-ms 2.0

The table is of this machine's GPU; for another device measure one there and give table=dict(file="v100.jsonl"). Each
detector is one more line; PruNet, ResNet and TimmBackbone configs all take the network found.
"""

title = "ImageNet to COCO"
table = dict(space="prunet_gpu", backend="torch", device="cuda", dtype="fp16")
search = dict(config="configs/search/tiered_prunet-gpu_imagenet.py", processes=8, args=["--amp"])
classifier = dict(config="configs/classification/prunet-p0_imagenet.py", processes=8, args=["--amp"])
detectors = dict(
    retinanet=dict(config="configs/detection/retinanet_prunet-p0_fpn_1x_coco.py", processes=8),
)
measure = dict(backend="torch", device="cuda", dtype="fp16")
