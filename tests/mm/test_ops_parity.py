"""The comparison with a compiled mmcv: it finds a difference, says what has no kernel, and needs a compiled mmcv."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from prunet_zoo.mm import ops
from prunet_zoo.mm.compat import SubstituteExt

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "mmcv_ops_parity.py"


@pytest.fixture(scope="module")
def parity() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mmcv_ops_parity", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["mmcv_ops_parity"] = module
    spec.loader.exec_module(module)
    return module


def first(parity: ModuleType, operator: str) -> Any:
    make = parity.Inputs("cpu")
    groups = (parity.box_cases, parity.roi_cases, parity.convolution_cases, parity.other_cases)
    return next(case for group in groups for case in group(make, True) if case.operator == operator)


def wrong(name: str, change: Any) -> Any:
    """The operators, one of them not right."""
    functions = {n: getattr(ops, n) for n in ops.__all__}
    return SimpleNamespace(**functions | {name: change(functions[name])})


def test_it_finds_no_difference_where_there_is_none(parity: ModuleType) -> None:
    row = parity.compare(first(parity, "nms_match"), ops, 0.001)
    assert row["same_indices"] and row["max_abs"] == row["max_rel"] == 0 and row["ours_ms"] > 0 and row["mmcv_ms"] > 0


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


def test_an_operator_without_a_kernel_is_said(parity: ModuleType) -> None:
    def missing(right: Any) -> Any:
        def forward(*args: Any, **kwargs: Any) -> None:
            raise RuntimeError("roi_pool_forward_impl: implementation for device cpu not found.\n")

        return forward

    row = parity.compare(first(parity, "roi_pool"), wrong("roi_pool_forward", missing), 0.001)
    assert "device cpu" in row["compiled"] and "mmcv_ms" not in row and row["ours_ms"] > 0
    (total,) = parity.summarise([row])
    assert "ratio" not in total
    parity.print_table([total], "a test")


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
