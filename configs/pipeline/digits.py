"""The whole way on built-in data, for two CPU cores: what tools/quickstart.sh runs.

python tools/pipeline.py configs/pipeline/digits.py
"""

title = "digits"
# waiting threads that spin make a run ten times slower where something else needs a core; for the networks of all
# stages but the detector a second thread gains nothing
env = dict(GOMP_SPINCOUNT="0", OMP_NUM_THREADS="1")
table = dict(space="prunet_cpu_small")
search = dict(config="configs/search/tiered_prunet-cpu-small_digits.py")
classifier = dict(config="configs/classification/prunet-cpu-small_digits.py")
detectors = dict(
    detector=dict(
        config="configs/detection/retinanet_prunet-cpu-small_fpn_digit-scenes.py",
        # the best weights were chosen on the test scans, which the scenes for validation are made of
        weights="last",
        env=dict(OMP_NUM_THREADS=None),  # not set: all cores
    )
)
measure = dict(backend="onnxruntime", threads=1)
