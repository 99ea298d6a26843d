"""What the tests of ``prunet://`` share: a weights folder of their own, and models in the zoo's index."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.registry import DefaultScope

from prunet_zoo import save_weights
from prunet_zoo.mm.cli import load_config
from prunet_zoo.models import create_model
from prunet_zoo.zoo.fetch import DownloadError
from prunet_zoo.zoo.index import ModelEntry, load_index

State = dict[str, torch.Tensor]


@pytest.fixture(scope="session")
def random_state() -> Callable[[torch.nn.Module], State]:
    """Makes the state dict of a model with statistics that differ from a fresh network's."""

    def make(model: torch.nn.Module) -> State:
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.uniform_(0.5, 1.5)
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}

    return make


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights folder of a test module."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def zoo_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The weights folder, no way to the network, and MMEngine's default scope as it was."""

    def offline(*args: Any, **kwargs: Any) -> None:
        raise DownloadError("no address could be reached")

    monkeypatch.setenv("PRUNET_HOME", str(home))
    monkeypatch.delenv("PRUNET_MIRROR", raising=False)
    monkeypatch.setattr("prunet_zoo.zoo.download.fetch", offline)
    kept = dict(DefaultScope._instance_dict)
    yield
    DefaultScope._instance_dict.clear()
    DefaultScope._instance_dict.update(kept)


@pytest.fixture
def list_model(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts a model, whose spec lies in its weights, into the zoo's index: ``list_model(name, **fields)``."""

    def put(name: str, **fields: Any) -> None:
        preprocess = {"input_size": 32, "mean": [0.5] * 3, "std": [0.25] * 3}
        weights = {"file": f"{name}.zip", "url": "https://example.invalid/x", "licence": "Apache-2.0", "origin": "test"}
        classes = tuple(str(i) for i in range(10))
        data = {"name": name, "config": "x.py", "classes": classes, "preprocess": preprocess, "weights": weights}
        monkeypatch.setitem(load_index(), name, ModelEntry.model_validate({**data, **fields}))

    return put


@pytest.fixture
def tiny(
    home: Path,
    tiny_config: Path,
    list_model: Callable[..., None],
    random_state: Callable[[torch.nn.Module], State],
) -> State:
    """``prunet://tiny``: a classifier for 10 classes, with the architecture of `tiny_config`."""
    list_model("tiny")
    torch.manual_seed(6)
    model = create_model(load_config(tiny_config).model.arch.to_dict())
    state = random_state(model)
    save_weights(home / "tiny.safetensors", state, model.spec)
    return state
