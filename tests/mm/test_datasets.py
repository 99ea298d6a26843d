from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.registry import DATASETS as ROOT_DATASETS
from mmengine.runner import Runner
from PIL import Image

import prunet_zoo  # noqa: F401  (registers)
from prunet_zoo.errors import DataError
from prunet_zoo.mm.cli import one_line

SAMPLER = dict(type="DefaultSampler", shuffle=False)
COLLATE = dict(type="default_collate")


def loader(dataset: dict, **options: object) -> torch.utils.data.DataLoader:
    return Runner.build_dataloader(
        dict(dataset=dataset, batch_size=4, sampler=SAMPLER, collate_fn=COLLATE, **{"num_workers": 0, **options}),
        seed=0,
    )


@pytest.mark.parametrize("name", ["DigitsDataset", "prunet_zoo.DigitsDataset"])
def test_batches_of_digits(name: str) -> None:
    batches = loader(dict(type=name, split="test", max_per_class=2))
    batch = next(iter(batches))
    assert batch["inputs"].shape == (4, 3, 32, 32) and batch["inputs"].dtype == torch.float32
    assert batch["label"].tolist() == batches.dataset.labels[:4] and batch["label"].dtype == torch.int64
    assert batches.dataset.metainfo == {"classes": tuple("0123456789")}
    assert len(batches.dataset) == 20


def test_image_folder(cifar10: Path) -> None:
    data = ROOT_DATASETS.build(
        dict(
            type="ImageFolderDataset",
            data_root=str(cifar10),
            split="val",
            transform=dict(type="cifar"),
            max_per_class=3,
        )
    )
    assert len(data) == 30 and data.metainfo["classes"][0] == "airplane"
    assert data[7]["inputs"].shape == (3, 32, 32) and data[7]["label"] == 2
    assert data.labels.count(9) == 3


def test_only_train_is_augmented_unless_told() -> None:
    def differs(**options: object) -> bool:
        data = ROOT_DATASETS.build(dict(type="DigitsDataset", **options))
        return not torch.equal(data[0]["inputs"], data[0]["inputs"])

    assert differs(split="train") and not differs(split="test")
    assert differs(split="test", augment=True) and not differs(split="train", augment=False)


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_image_is_one_clear_line(tmp_path: Path, workers: int) -> None:
    (tmp_path / "train" / "a").mkdir(parents=True)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "train" / "a" / "0.png")
    (tmp_path / "train" / "a" / "1.png").write_bytes(b"broken")
    data = dict(type="ImageFolderDataset", data_root=str(tmp_path), transform=dict(type="cifar"))
    with pytest.raises(DataError) as caught:
        list(loader(data, num_workers=workers))
    line = one_line(caught.value)
    assert line.startswith("cannot read image") and "1.png" in line and "\n" not in line
