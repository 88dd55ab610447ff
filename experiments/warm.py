"""Imported once by the server that worker processes are forked from: what takes seconds to start is then shared by all.

Loading the tropical kernels, or compiling them the first time, takes longer than many a small cell.
"""

from __future__ import annotations

import torch

from lit_modules.ops.tropical import tropical_conv2d

torch.set_num_threads(1)
for dtype in (torch.float32, torch.float64):
    x_BCHW = torch.zeros(1, 1, 1, 1, dtype=dtype, requires_grad=True)
    tropical_conv2d(x_BCHW, x_BCHW.detach().clone(), inner="min", outer="sum").sum().backward()
torch.optim.Adam([x_BCHW]).step()
