"""Published tensor names of the seven networks, derived from their specs; equality with the published lists is tested.

Two families of names occur in NVIDIA's GPUNet release (PyTorch/Classification/GPUNet of DeepLearningExamples):

- GPUNet-0/1/2, P0, P1: ``network.head: 2.net.0.weight``, ``network.stage: 3 layer6.conv_pw.weight``,
  ``network. layer17.net.6.weight``, with the layer names of timm's EfficientNet blocks inside a layer;
- the distilled D1, D2: ``network.head:.net.0.weight``, ``network.stage: 0 irb3.body.0.weight``,
  ``network.tail:.net.8.weight``, with positions in an ``nn.Sequential`` inside a layer.

Layers are numbered through the whole list, which begins with the data layer (1) and the head (2).
"""

from __future__ import annotations

from collections.abc import Iterator

from prunet_zoo.spec import BlockSpec, NetSpec

# published stage number of each of our stages after the stem; networks that are not here have no published names
STAGES: dict[str, tuple[int, ...]] = {
    "prunet_p0": (1, 2, 3, 4, 5, 6),
    "prunet_p1": (1, 2, 3, 4, 5, 6),
    "gpunet_0": (1, 2, 3, 4, 6),
    "gpunet_1": (1, 2, 3, 4, 5, 6),
    "gpunet_2": (1, 2, 3, 4, 5, 6, 7),
    "gpunet_d1": (0, 1, 2, 3, 4),
    "gpunet_d2": (0, 1, 2, 3, 4),
}
_FIRST_LAYER = 3
_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")

# (ours, published) modules inside a layer
_EFFICIENTNET = {
    "conv": (("conv.conv", "conv"), ("conv.norm", "bn1")),
    "irb": (
        ("expand.conv", "conv_pw"),
        ("expand.norm", "bn1"),
        ("depthwise.conv", "conv_dw"),
        ("depthwise.norm", "bn2"),
        ("se.reduce", "se.conv_reduce"),
        ("se.expand", "se.conv_expand"),
        ("project.conv", "conv_pwl"),
        ("project.norm", "bn3"),
    ),
    "fused_irb": (
        ("expand.conv", "conv_exp"),
        ("expand.norm", "bn1"),
        ("se.reduce", "se.conv_reduce"),
        ("se.expand", "se.conv_expand"),
        ("project.conv", "conv_pwl"),
        ("project.norm", "bn2"),
    ),
}
_SEQUENTIAL = (  # conv, norm, act, conv, norm, act, conv, norm
    ("expand.conv", "body.0"),
    ("expand.norm", "body.1"),
    ("depthwise.conv", "body.3"),
    ("depthwise.norm", "body.4"),
    ("project.conv", "body.6"),
    ("project.norm", "body.7"),
)


def published_names(spec: NetSpec, stages: tuple[int, ...]) -> dict[str, str]:
    """Our name of every tensor of the classifier of ``spec`` → its published name.

    Args:
        spec: a published architecture.
        stages: see `STAGES`.
    """
    return {f"{ours}.{leaf}": f"{theirs}.{leaf}" for ours, theirs in _modules(spec, stages) for leaf in _leaves(ours)}


def _modules(spec: NetSpec, stages: tuple[int, ...]) -> Iterator[tuple[str, str]]:
    """Pairs of module names (ours, published), in the order of the network."""
    distilled = spec.tail.head_hidden is not None
    head = "network.head:.net" if distilled else "network.head: 2.net"
    for i in range(len(spec.stages[0].blocks)):  # each is conv, norm, act
        yield f"stages.0.{i}.conv.conv", f"{head}.{3 * i}"
        yield f"stages.0.{i}.conv.norm", f"{head}.{3 * i + 1}"
    layer = _FIRST_LAYER
    for s, (stage, number) in enumerate(zip(spec.stages[1:], stages, strict=True), 1):
        for i, block in enumerate(stage.blocks):
            prefix = f"network.stage: {number} {'irb' if distilled else 'layer'}{layer}"
            for ours, theirs in _inner(block, distilled):
                yield f"stages.{s}.{i}.{ours}", f"{prefix}.{theirs}"
            layer += 1
    tail = "network.tail:.net" if distilled else f"network. layer{layer}.net"
    yield "tail.conv", f"{tail}.0"
    yield "tail.norm", f"{tail}.1"
    if distilled:  # conv, norm, act, pool, conv, act, flatten, dropout, linear
        yield "head.conv", f"{tail}.4"
    yield "classifier", f"{tail}.8" if distilled else f"{tail}.6"


def _inner(block: BlockSpec, distilled: bool) -> list[tuple[str, str]]:
    pairs = _SEQUENTIAL if distilled else _EFFICIENTNET[block.type]
    return [(ours, theirs) for ours, theirs in pairs if block.se_ratio or not ours.startswith("se.")]


def _leaves(module: str) -> tuple[str, ...]:
    """Tensors of one of our modules."""
    if module.endswith("norm"):
        return _NORM
    has_bias = module == "classifier" or ".se." in module
    return ("weight", "bias") if has_bias else ("weight",)
