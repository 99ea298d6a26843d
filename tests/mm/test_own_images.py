"""--data-root: one option points all parts of a config at one's own images."""

from __future__ import annotations

from pathlib import Path

import pytest
from mmengine.config import Config
from PIL import Image

from prunet_zoo.errors import DataError
from prunet_zoo.mm.cli import ConfigError
from prunet_zoo.mm.own_images import set_data_root

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split in ("train", "val"):
        for name in ("ant", "bee", "cow"):
            (tmp_path / "mine" / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / "mine" / split / name / "0.png")
    return tmp_path / "mine"


@pytest.mark.parametrize(
    "name", ["search/tiered_prunet-cpu-small_cifar10.py", "classification/prunet-cpu-small_cifar10.py"]
)
def test_every_part_reads_the_folder_and_the_model_has_its_classes(folder: Path, name: str):
    cfg = Config.fromfile(ROOT / "configs" / name)
    set_data_root(cfg, folder)
    loaders = [cfg.train_dataloader, cfg.train_cfg.get("arch_dataloader"), cfg.train_cfg.get("val_dataloader")]
    loaders.append(cfg.get("val_dataloader"))
    roots = [loader.dataset.data_root for loader in loaders if loader]
    assert len(roots) >= 2 and set(roots) == {str(folder)} and cfg.model.num_classes == 3


def test_none_changes_nothing_and_bad_folders_and_configs_are_named(folder: Path, tmp_path: Path):
    cfg = Config.fromfile(ROOT / "configs" / "search" / "tiered_prunet-cpu-small_cifar10.py")
    before = cfg.to_dict()
    set_data_root(cfg, None)
    assert cfg.to_dict() == before
    with pytest.raises(DataError, match="does not exist"):
        set_data_root(cfg, tmp_path / "nowhere")
    digits = Config.fromfile(ROOT / "configs" / "search" / "tiered_prunet-cpu-small_digits.py")
    with pytest.raises(ConfigError, match="image folder"):
        set_data_root(digits, folder)
