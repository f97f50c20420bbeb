"""Tiny tensors are fastest on one thread, the more so when several test workers share the machine."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
