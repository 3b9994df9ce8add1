"""Where tests of models put their tensors: `TEST_DEVICE` (cuda), else the CPU.

`benchmarks/gpu.py` sets it: the same tests then hold on a GPU.
"""

from __future__ import annotations

import os

import torch

DEVICE = os.environ.get("TEST_DEVICE") or "cpu"
if DEVICE != "cpu":
    # cuDNN multiplies in TF32 unless told otherwise: its error is larger than the tests' bounds.
    torch.backends.cudnn.allow_tf32 = False
