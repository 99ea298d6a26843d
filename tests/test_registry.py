"""Names resolve as configs write them: unprefixed in every OpenMMLab package, and as ``prunet_zoo.X``."""

from __future__ import annotations

import pytest

pytest.importorskip("mmengine")

from mmengine import registry as root
from mmengine.registry import DefaultScope, Registry

import prunet_zoo
from prunet_zoo import registry
from prunet_zoo.models import PruNetBackbone

CHILDREN = [
    "MODELS",
    "DATASETS",
    "HOOKS",
    "LOOPS",
    "METRICS",
    "OPTIMIZERS",
    "PARAM_SCHEDULERS",
    "RUNNERS",
    "TASK_UTILS",
]


@pytest.mark.parametrize("name", CHILDREN)
def test_children_of_the_root_registries(name: str) -> None:
    child = getattr(registry, name)
    assert child.scope == "prunet_zoo"
    assert child.parent is getattr(root, name)


@pytest.mark.parametrize("name", ["PruNet", "prunet_zoo.PruNet", "mmengine.PruNet"])
def test_the_backbone_resolves(name: str) -> None:
    cls = root.MODELS.get(name)
    assert cls is not None
    assert issubclass(cls, PruNetBackbone)
    assert cls is registry.MODELS.get("PruNet")


@pytest.mark.parametrize("scope", ["mmdet", "prunet_zoo", "mmengine"])
def test_the_backbone_builds_in_any_default_scope(scope: str) -> None:
    if scope == "mmdet":
        pytest.importorskip("mmdet")
        from mmdet.registry import MODELS
    else:
        MODELS = root.MODELS
    with DefaultScope.overwrite_default_scope(scope):
        backbone = MODELS.build({"type": "PruNet", "arch": "prunet_p0", "out_indices": (1,)})
    assert backbone.out_channels == [64]


def test_register_puts_a_class_into_both() -> None:
    parent = Registry("a thing of the tests")
    child = Registry("a thing of the tests", parent=parent, scope="tests_of_registry")

    @registry.register(child)
    class Plain:
        pass

    @registry.register(child, name="Renamed")
    class Other:
        pass

    assert child.get("Plain") is parent.get("Plain") is Plain
    assert child.get("Renamed") is parent.get("Renamed") is Other
    assert parent.get("Other") is None
    registry.register(child)(Plain)  # a second import must not fail


def test_import_registers() -> None:
    assert prunet_zoo.__version__
    assert "PruNet" in root.MODELS.module_dict
