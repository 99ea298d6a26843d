"""Networks built from a `NetSpec`: classifier, backbone, their weights."""

from prunet_zoo.models.backbone import PruNetBackbone
from prunet_zoo.models.classifier import PruNetClassifier, create_model
from prunet_zoo.models.pruned import PrunedSpec, build_pruned, load_pruned
from prunet_zoo.models.rep import switch_to_deploy
from prunet_zoo.models.weights import load_state, load_weights, read_weights_spec, save_weights

__all__ = [
    "PruNetBackbone",
    "PruNetClassifier",
    "PrunedSpec",
    "build_pruned",
    "create_model",
    "load_pruned",
    "load_state",
    "load_weights",
    "read_weights_spec",
    "save_weights",
    "switch_to_deploy",
]
