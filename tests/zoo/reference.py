"""The seven published networks once more, in plain torch, straight from published.json: the proof that ours are those.

Nothing of prunet_zoo is used: a network is a function of its published layer list and its published tensors by name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

NETWORKS: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "published.json").read_text())["networks"]
NAMES = {  # ours → published
    "prunet_p0": "GPUNet-P0",
    "prunet_p1": "GPUNet-P1",
    "gpunet_0": "GPUNet-0",
    "gpunet_1": "GPUNet-1",
    "gpunet_2": "GPUNet-2",
    "gpunet_d1": "GPUNet-D1",
    "gpunet_d2": "GPUNet-D2",
}
ACTS = {"relu": F.relu, "swish": F.silu}
State = dict[str, torch.Tensor]


def published(name: str) -> dict[str, Any]:
    """The published facts of one of our names."""
    return NETWORKS[NAMES[name]]


class Reference:
    """A published network with given tensors: ``logits, maps = Reference(name, state)(images)``.

    ``maps`` are the outputs of the layers by their total stride, the last one of each stride.
    """

    def __init__(self, name: str, state: State) -> None:
        self.layers, self.state = published(name)["layers"], state
        self.distilled = self.layers[0]["distill"]

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        maps, stride = {}, 1
        for number, layer in enumerate(self.layers[1:-1], 2):  # the data layer is number 1
            kind = layer["layer_type"]
            if kind.startswith("head"):
                x, stride = self.head(x, layer), 2
            else:
                prefix = f"network.stage: {layer['stage']} {'irb' if self.distilled else 'layer'}{number}."
                x = getattr(self, kind)(x, layer, prefix)
                stride *= layer["stride"]
            maps[stride] = x
        tail = "network.tail:.net." if self.distilled else f"network. layer{len(self.layers)}.net."
        return self.tail(x, tail), maps

    def conv_bn(self, x, conv: str, bn: str, layer=None, padding=None, eps=None) -> torch.Tensor:
        """Convolution (depth-wise where the weight says so) and BatchNorm with fixed statistics."""
        weight = self.state[f"{conv}.weight"]
        k, stride = weight.shape[-1], layer["stride"] if layer else 1
        groups = x.shape[1] // weight.shape[1]
        x = F.conv2d(x, weight, None, stride, k // 2 if padding is None else padding, groups=groups)
        mean, var, scale, shift = (self.state[f"{bn}.{n}"] for n in ("running_mean", "running_var", "weight", "bias"))
        eps = (1e-5 if self.distilled else 1e-3) if eps is None else eps
        return F.batch_norm(x, mean, var, scale, shift, training=False, eps=eps)

    def head(self, x, layer) -> torch.Tensor:
        if self.distilled:
            steps, stem, act = (0, 3, 6) if layer["layer_type"] == "head_large" else (0,), "network.head:.net.", F.relu
        else:
            steps, stem, act = (0,), "network.head: 2.net.", ACTS[layer.get("act", "swish")]
        for i in steps:
            x = act(self.conv_bn(x, f"{stem}{i}", f"{stem}{i + 1}", {"stride": 1 if i else 2}))
        return x

    def conv(self, x, layer, prefix) -> torch.Tensor:
        return ACTS[layer["act"]](self.conv_bn(x, f"{prefix}conv", f"{prefix}bn1", layer))

    def irb(self, x, layer, prefix) -> torch.Tensor:
        act = ACTS[layer.get("act", "relu")]
        names = ("body.0", "body.1", "body.3", "body.4", "body.6", "body.7")
        if not self.distilled:
            names = ("conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3")
        expand, bn1, depthwise, bn2, project, bn3 = (prefix + name for name in names)
        y = act(self.conv_bn(x, expand, bn1))
        y = act(self.conv_bn(y, depthwise, bn2, layer))
        y = self.squeeze_excite(y, layer, prefix, act)
        return self.residual(x, self.conv_bn(y, project, bn3), layer)

    def fused_irb(self, x, layer, prefix) -> torch.Tensor:
        act = ACTS[layer["act"]]
        padding = 0 if layer["stride"] == 2 else layer["kernel_size"] // 2
        y = act(self.conv_bn(x, f"{prefix}conv_exp", f"{prefix}bn1", layer, padding, eps=1e-3))
        y = self.squeeze_excite(y, layer, prefix, act)
        return self.residual(x, self.conv_bn(y, f"{prefix}conv_pwl", f"{prefix}bn2", eps=1e-3), layer)

    def squeeze_excite(self, x, layer, prefix, act) -> torch.Tensor:
        if not layer.get("use_se"):
            return x
        reduce, expand = f"{prefix}se.conv_reduce", f"{prefix}se.conv_expand"
        y = x.mean((2, 3), keepdim=True)
        y = act(F.conv2d(y, self.state[f"{reduce}.weight"], self.state[f"{reduce}.bias"]))
        assert y.shape[1] == round(x.shape[1] * 0.25 / layer["expansion"])
        return x * torch.sigmoid(F.conv2d(y, self.state[f"{expand}.weight"], self.state[f"{expand}.bias"]))

    def residual(self, x, y, layer) -> torch.Tensor:
        return x + y if layer["stride"] == 1 and layer["num_in_channels"] == layer["num_out_channels"] else y

    def tail(self, x, net: str) -> torch.Tensor:
        x = F.relu(self.conv_bn(x, f"{net}0", f"{net}1")).mean((2, 3))
        if self.distilled:
            x = F.relu(x @ self.state[f"{net}4.weight"].flatten(1).T)
        linear = f"{net}8" if self.distilled else f"{net}6"
        return x @ self.state[f"{linear}.weight"].T + self.state[f"{linear}.bias"]
