"""The only place (with registry.py) that knows MMEngine, mmcv and mmdet. Importing it registers everything.

Neither mmcv nor mmdet is imported here, so it costs little and works without them.
"""

from prunet_zoo.mm import compat

compat.prepare()  # before anything that might import mmcv.ops or load a checkpoint

from prunet_zoo.mm import (  # noqa: E402  (register)
    backbone,  # noqa: F401
    channels,
    checkpoint,  # noqa: F401
    classifier,  # noqa: F401
    datasets,  # noqa: F401
    distributed,  # noqa: F401
    epoch_loop,  # noqa: F401
    hooks,  # noqa: F401
    metrics,  # noqa: F401
    optim,  # noqa: F401
    progress,  # noqa: F401
    runner,  # noqa: F401
    scheme,
    search_loop,  # noqa: F401
    supernet_model,  # noqa: F401
    timm_backbone,  # noqa: F401
)

channels.install()
scheme.install()
