"""Networks as files for other runtimes: BatchNorm folded, written, and kept when they compute what torch computes."""

from prunet_zoo.models.export.errors import ExportError
from prunet_zoo.models.export.fold import count_batchnorms, fold_batchnorm
from prunet_zoo.models.export.formats import FORMATS, Format, Plan
from prunet_zoo.models.export.job import Options, export
from prunet_zoo.models.export.network import Network, Scaling
from prunet_zoo.models.export.onnx import export_onnx
from prunet_zoo.models.export.openvino_core import openvino_core

__all__ = [
    "FORMATS",
    "ExportError",
    "Format",
    "Network",
    "Options",
    "Plan",
    "Scaling",
    "count_batchnorms",
    "export",
    "export_onnx",
    "fold_batchnorm",
    "openvino_core",
]
