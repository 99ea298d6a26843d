"""Optimisers of timm under the names their publications use."""

from __future__ import annotations

from timm.optim import RMSpropTF

from prunet_zoo.registry import OPTIMIZERS, register

register(OPTIMIZERS, "RMSpropTF")(RMSpropTF)
