"""The comparison with a compiled mmcv: it finds a difference, says what has no kernel, and needs a compiled mmcv."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from prunet_zoo.errors import PrunetError
from prunet_zoo.mm import ops
from prunet_zoo.mm.compat import SubstituteExt


@pytest.fixture(scope="module")
def parity(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("mmcv_ops_parity")


def first(parity: ModuleType, operator: str) -> Any:
    make = parity.Inputs("cpu")
    groups = (parity.box_cases, parity.roi_cases, parity.convolution_cases, parity.other_cases)
    found = (case for group in groups for case in group(make, True) if case.operator == operator)
    return next(case for case in found if not case.label.startswith("0 "))


def wrong(name: str, change: Any) -> Any:
    """The operators, one of them not right."""
    functions = {n: getattr(ops, n) for n in ops.__all__}
    return SimpleNamespace(**functions | {name: change(functions[name])})


def test_it_finds_no_difference_where_there_is_none(parity: ModuleType) -> None:
    row = parity.compare(first(parity, "nms_match"), ops, 0.001)
    assert (
        row["against"] == "mmcv"
        and row["same_indices"]
        and row["max_abs"] == row["max_rel"] == 0
        and row["ours_ms"] > 0
        and row["mmcv_ms"] > 0
    )


def test_it_finds_a_wrong_derivative(parity: ModuleType) -> None:
    def doubled(right: Any) -> Any:
        def backward(*args: Any, **kwargs: Any) -> None:
            right(*args, **kwargs)
            args[4].mul_(2)  # grad_input

        return backward

    row = parity.compare(first(parity, "roi_align avg"), wrong("roi_align_backward", doubled), 0.001)
    assert row["max_rel"] == pytest.approx(0.5)
    assert parity.compare(first(parity, "roi_align avg"), ops, 0.001)["max_abs"] == 0  # nothing was left behind


def test_it_finds_another_order(parity: ModuleType) -> None:
    make = parity.Inputs("cpu")
    case = next(c for c in parity.box_cases(make, True) if c.label.startswith("200 boxes"))
    row = parity.compare(case, wrong("nms", lambda right: lambda *a, **k: right(*a, **k).flip(0)), 0.001)
    assert row["same_indices"] is False
    row = parity.compare(case, wrong("nms", lambda right: lambda *a, **k: right(*a, **k)[1:]), 0.001)
    assert row["same_indices"] is False  # fewer


def missing(right: Any) -> Any:
    def forward(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("roi_pool_forward_impl: implementation for device cpu not found.\n")

    return forward


def test_an_operator_without_a_kernel_is_compared_with_the_formula(
    parity: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, without = first(parity, "roi_pool"), wrong("roi_pool_forward", missing)
    row = parity.compare(case, without, 0.001)
    assert "device cpu" in row["compiled"] and "mmcv_ms" not in row and row["ours_ms"] > 0
    assert row["against"] == "formula" and row["max_rel"] < 1e-6
    (total,) = parity.summarise([row])
    assert "ratio" not in total
    parity.print_table([total], "a test")
    right = ops.roi_pool_backward
    monkeypatch.setattr(ops, "roi_pool_backward", lambda *a, **k: (right(*a, **k), a[3].mul_(2)))
    assert parity.compare(case, without, 0.001)["max_rel"] == pytest.approx(1)
    case.formula = None
    with pytest.raises(PrunetError, match="nothing to be compared with"):
        parity.compare(case, without, 0.001)


@pytest.mark.parametrize("operator", ["masked_conv2d", "sigmoid_focal_loss", "softmax_focal_loss", "ms_deform_attn"])
def test_ours_is_the_formula(parity: ModuleType, operator: str) -> None:
    make = parity.Inputs("cpu")
    cases = [c for g in (parity.convolution_cases, parity.other_cases) for c in g(make, True) if c.operator == operator]
    assert {case.dtype for case in cases} == {torch.float32, *parity.HALF}
    for case in cases:
        with parity.extension(ops):
            gap = parity.differences(case.run(), case.exact())["max_rel"]
        bound = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[case.dtype]
        # mmcv's Python takes the softmax in half precision, where small probabilities have few bits
        assert gap < bound or (operator.startswith("softmax") and case.half), case.label


def test_half_precision_is_compared_with_float64(parity: ModuleType) -> None:
    """Whether the compiled mmcv has a kernel for it or not; whose error is whose is said."""
    make = parity.Inputs("cpu")
    case = next(c for c in parity.roi_cases(make, True) if c.dtype == torch.float16)
    row = parity.compare(case, ops, 0.001)
    assert (row["against"], row["dtype"]) == ("float64", "float16") and 0 < row["max_rel"] == row["mmcv_max_rel"] < 1e-3

    def unknown(right: Any) -> Any:
        def forward(*args: Any, **kwargs: Any) -> None:
            raise RuntimeError("\"ROIAlign_forward\" not implemented for 'Half'")

        return forward

    row = parity.compare(case, wrong("roi_align_forward", unknown), 0.001)
    assert 0 < row["max_rel"] < 1e-3 and "mmcv_max_rel" not in row and "Half" in row["compiled"]
    rows = [row, parity.compare(first(parity, "roi_align avg"), ops, 0.001)]
    assert [(r["dtype"], r["against"]) for r in parity.summarise(rows)] == [("float16", "float64"), ("float32", "mmcv")]


def test_a_failure_of_the_compiled_one_is_not_hidden(parity: ModuleType) -> None:
    def fails(right: Any) -> Any:
        def forward(*args: Any, **kwargs: Any) -> None:
            raise RuntimeError("out of memory")

        return forward

    with pytest.raises(RuntimeError, match="out of memory"):
        parity.compare(first(parity, "roi_pool"), wrong("roi_pool_forward", fails), 0.001)


@pytest.mark.skipif(not isinstance(sys.modules.get("mmcv._ext"), SubstituteExt), reason="a compiled mmcv is installed")
def test_without_a_compiled_mmcv_it_ends_with_a_message(parity: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parity.run_tool(parity.main, [])
    assert stop.value.code == 2
    assert "mmcv-lite" in (message := capsys.readouterr().err) and "pip install 'mmcv" in message
    assert message.count("\n") == 1
