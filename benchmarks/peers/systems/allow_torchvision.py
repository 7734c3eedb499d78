"""Imported for what it does: lets torchvision be imported beside a PyTorch of another build.

pip may bring a torchvision that was built for CUDA, whose operators PyTorch for CPU cannot load.
Some systems import torchvision for data sets that are not used here; naming operators is enough.
"""

from __future__ import annotations

import torch

LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
for operator in ("nms", "qnms"):
    LIBRARY.define(f"{operator}(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor")
