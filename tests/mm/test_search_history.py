"""What a search notes of its memory."""

from __future__ import annotations

import pytest
import torch

from prunet_zoo.mm.search_history import peak_memory_mb


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a GPU the allocations of this process count")
def test_peak_memory_counts_the_methods_other_processes() -> None:
    alone = peak_memory_mb()
    assert alone > 50 and alone + 1e6 <= peak_memory_mb(1e6) < alone + 2e6
