"""The one `openvino.Core` of a process."""

from __future__ import annotations

import functools
from typing import Any


@functools.cache
def openvino_core() -> Any:
    """An `openvino.Core`, made once and kept.

    Each Core gives the thread a signal stack of its own and frees it at its end. Where two live at a time and the older
    one ends first, the younger one's end brings a freed stack back, and the next signal (Ctrl-C) is a segmentation
    fault (seen with OpenVINO 2026.4 and Python 3.11, whose handlers run on that stack).
    """
    import openvino

    return openvino.Core()
