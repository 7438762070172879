"""Lets torchvision be imported beside a CPU-only torch, whatever imports it: timm, torchmetrics.

PyPI's torchvision is built for CUDA. Beside a CPU-only torch its library cannot load; torchvision
tolerates that but for two operators that it describes at import without having them ("operator
torchvision::nms does not exist", pytorch/vision#9085). Declaring them, without any kernel, lets
torchvision import; calling them still fails clearly. Where the library loads, nothing
is declared. A wheel from PyTorch's own index for CPUs needs none of this.
"""

from __future__ import annotations

import importlib.util
import pathlib

import torch


def _declare_missing_operators() -> torch.library.Library | None:
    if torch.version.cuda is not None or torch.version.hip is not None:
        return None
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None or hasattr(torch.ops.torchvision, "nms"):
        return None
    for extension in pathlib.Path(found.origin).parent.glob("_C*.so"):
        try:
            torch.ops.load_library(str(extension))  # type: ignore[no-untyped-call]
        except OSError:
            continue
        return None
    declared = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for operator in ("nms", "qnms"):
        schema = f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        declared.define(schema)  # type: ignore[no-untyped-call]
    return declared


# Kept, because the declarations last as long as this object
DECLARED = _declare_missing_operators()
