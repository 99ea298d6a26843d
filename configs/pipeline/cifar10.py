"""CIFAR-10 in data/cifar10/{train,test}/<class>/: search and training of a classifier for one CPU thread, no detector.

python tools/pipeline.py configs/pipeline/cifar10.py
"""

title = "CIFAR-10"
env = dict(GOMP_SPINCOUNT="0", OMP_NUM_THREADS="1")
table = dict(space="prunet_cpu_small")
search = dict(config="configs/search/tiered_prunet-cpu-small_cifar10.py")
classifier = dict(config="configs/classification/prunet-cpu-small_cifar10.py")
measure = dict(backend="onnxruntime", threads=1)
