"""Networks built from a `NetSpec`: classifier, backbone, their weights."""

from prunet_zoo.models.backbone import PruNetBackbone
from prunet_zoo.models.classifier import PruNetClassifier, create_model
from prunet_zoo.models.weights import load_state, load_weights, read_weights_spec, save_weights

__all__ = [
    "PruNetBackbone",
    "PruNetClassifier",
    "create_model",
    "load_state",
    "load_weights",
    "read_weights_spec",
    "save_weights",
]
