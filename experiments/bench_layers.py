"""Speed and memory of the blur's physics and of the experts' dispatch, as ratios to named peers in the same run.

Peers: SciPy's Fourier convolution, one channel after the other; kernels drawn one by one; albumentations' MotionBlur, a
simpler blur (straight lines, no sensor) and only a yardstick; a loop over experts, as transformers' Mixtral had it; every
expert for every token.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.bench import Row, compared, save


def measure_convolution(batch: int, side: int, extent: int) -> list[Row]:
    """Return images blurred with a kernel each: ours against one channel after the other. No backward."""
    import numpy as np
    import torch
    from scipy.signal import fftconvolve

    from datamodules.blur import convolve

    images, kernels = torch.rand(batch, 3, side, side), torch.rand(batch, extent, extent)

    def one_by_one(x: Any, k: Any) -> Any:
        half = extent // 2
        padded = np.pad(x.numpy(), ((0, 0), (0, 0), (half, half), (half, half)), mode="reflect")
        each = [
            [fftconvolve(c, kernel, mode="valid") for c in image]
            for image, kernel in zip(padded, k.numpy(), strict=True)
        ]
        return torch.from_numpy(np.array(each))

    peers: dict[str, Callable[[Any, Any], Any]] = {"batched (ours)": convolve, "SciPy, one by one": one_by_one}
    return compared(f"blur of {batch} images, {side} px, kernel {extent}", peers, images, kernels)


def measure_photographs(batch: int, side: int) -> list[Row]:
    """Return kernels of the training law drawn, applied, and photographed with noise: ours, one by one, and albumentations."""
    import albumentations
    import numpy as np
    import torch

    from datamodules.blur import CAMERAS, key_of, motion_kernels, photograph, preset

    keys = key_of(0, "train", torch.arange(batch), 0)
    motion, camera = preset("training"), CAMERAS["sensor"]
    lines = albumentations.MotionBlur(blur_limit=(3, 15), p=1.0)

    def ours(x: Any, k: Any) -> Any:
        return photograph(x, motion_kernels(motion, k, side), camera, k)

    def one_by_one(x: Any, k: Any) -> Any:
        return torch.cat([ours(x[i : i + 1], k[i : i + 1]) for i in range(len(x))])

    def library(x: Any, k: Any) -> Any:
        pictures = (x.permute(0, 2, 3, 1).numpy() * 255).astype(np.uint8)
        return torch.from_numpy(np.stack([lines(image=picture)["image"] for picture in pictures]))

    peers: dict[str, Callable[[Any, Any], Any]] = {
        "batched (ours)": ours,
        "the same, one by one": one_by_one,
        "albumentations (yardstick)": library,
    }
    return compared(f"photographs of {batch} images, {side} px", peers, torch.rand(batch, 3, side, side), keys)


def measure_experts(tokens: int, width: int, experts: int, hidden: int, top_k: int) -> list[Row]:
    """Return the experts of a layer on routed tokens: sorted and grouped (ours), a loop over experts, all for every token."""
    import torch

    from lit_modules.ops.experts import expert_mlp, squared_relu
    from lit_modules.ops.routing import route

    routing = route(torch.randn(tokens, experts), top_k, "softmax_topk")
    x = torch.randn(tokens, width, requires_grad=True)
    w = (torch.randn(2, experts, hidden, width) * width**-0.5).requires_grad_()  # up, and down transposed

    def through(backend: Any) -> Callable[[Any, Any], Any]:
        return lambda x, w: expert_mlp(x, routing, w[0], w[1].mT, backend=backend)

    def every(x: Any, w: Any) -> Any:
        y = squared_relu(x @ w[0].mT) @ w[1]
        weights = torch.zeros(tokens, experts).scatter(1, routing.experts_SK, routing.weights_SK)
        return torch.einsum("nsd,sn->sd", y, weights)

    peers: dict[str, Callable[[Any, Any], Any]] = {
        "sorted, grouped (ours)": through("grouped"),
        "loop over experts": through("loop"),
        "every expert for every token": every,
    }
    return compared(f"{experts} experts of {hidden}, top {top_k}, {tokens} tokens of {width}", peers, x, w)


def run_layer_bench(out: Path) -> None:
    """Measure, print, and write blur.csv and experts.csv."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    blur = measure_convolution(16, 64, 13) + measure_convolution(16, 64, 33) + measure_convolution(4, 256, 65)
    save(blur + measure_photographs(16, 64) + measure_photographs(4, 256), out / "blur.csv")
    shapes = ((1024, 64, 8, 256, 1), (1024, 64, 8, 256, 2), (1024, 64, 64, 32, 8), (2048, 256, 64, 128, 8))
    save([row for shape in shapes for row in measure_experts(*shape)], out / "experts.csv")
