"""Folding and ONNX: the same numbers out, whole files only, both exporters tried."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from prunet_zoo.latency.probes import randomise
from prunet_zoo.models import create_model
from prunet_zoo.models.export import ExportError, export_onnx, fold_batchnorm
from prunet_zoo.models.export import onnx as exporters

SPEC = {
    "input_size": 32,
    "stages": [
        {"blocks": [{"type": "conv", "out_channels": 8, "stride": 2, "act": "hard_swish"}]},
        {
            "blocks": [
                {"type": "irb", "out_channels": 8, "hidden": 24, "kernel_size": 5, "se_ratio": 0.5, "act": "silu"},
                {"type": "fused_irb", "out_channels": 16, "hidden": 24, "stride": 2},
            ]
        },
    ],
    "tail": {"out_channels": 16},
    "num_classes": 5,
}


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return randomise(create_model(SPEC))


def test_folded_network_has_no_norms_and_computes_the_same(model):
    x = torch.randn(2, 3, 32, 32)
    names = list(model.state_dict())
    folded = fold_batchnorm(model)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    with torch.inference_mode():
        torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)
    assert list(model.state_dict()) == names  # the given network is untouched


@pytest.mark.parametrize("exporter", ["both", "dynamo"])
def test_onnx_computes_what_torch_computes(model, tmp_path, monkeypatch, exporter):
    onnxruntime = pytest.importorskip("onnxruntime")
    if exporter == "dynamo":
        pytest.importorskip("onnxscript")

        def gone(*args):
            raise RuntimeError("the exporter was removed")

        monkeypatch.setattr(exporters, "_export_torchscript", gone)
        gone.__name__ = "_export_torchscript"
    data = export_onnx(model.train(), (2, 3, 32, 32), tmp_path / "a" / "net.onnx")
    assert model.training
    assert (tmp_path / "a" / "net.onnx").read_bytes() == data
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    x = torch.randn(2, 3, 32, 32)
    (got,) = session.run(None, {"input": x.numpy()})
    with torch.inference_mode():
        np.testing.assert_allclose(got, model.eval()(x).numpy(), rtol=1e-4, atol=1e-4)


def test_failure_gives_both_reasons_and_writes_nothing(model, tmp_path, monkeypatch):
    for name in ("_export_torchscript", "_export_dynamo"):

        def fail(*args, _name=name):
            raise RuntimeError(f"no {_name}")

        fail.__name__ = name
        monkeypatch.setattr(exporters, name, fail)
    with pytest.raises(ExportError, match=r"no _export_torchscript.*no _export_dynamo.*prunet_zoo\[export\]"):
        export_onnx(model, (1, 3, 32, 32), tmp_path / "net.onnx")
    assert list(tmp_path.iterdir()) == []
