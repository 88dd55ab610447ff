"""Classical deconvolution with the true blur kernel, which no method would know in practice: a reference for paper 2.

Shape legend: B batch, C channels, H height, W width, K kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from lightning import LightningModule
from torch import Tensor, nn

from lit_modules.deblur_report import DeblurReport
from lit_modules.ops.image_quality import psnr

STRENGTHS = {
    "wiener": (0.003, 0.01, 0.03, 0.1, 0.3, 1.0),  # weight of the Laplacian's power against the noise's
    "richardson_lucy": (3, 5, 10, 20, 40),  # iterations: fewer smooth more
}


class KnownKernel(LightningModule):
    """Deconvolve with the kernels of the pairs; how strongly is chosen by PSNR on the validation set, before the test.

    Args:
        net: unused, the identity: there is nothing to train.
        report: measures the test sets.
        method: "wiener" or "richardson_lucy".
    Logs: `chosen/strength`; all that the report measures.
    Raises:
        ValueError: an unknown method.
    Source: scikit-image's `restoration`; images are extended by reflection first, since beyond their border one supposes a
        periodic image and the other darkness.
    """

    def __init__(self, net: nn.Module, report: DeblurReport, method: str = "wiener", **_: Any) -> None:
        super().__init__()
        if method not in STRENGTHS:
            raise ValueError(f"unknown method {method!r}; known: {', '.join(STRENGTHS)}")
        self.net, self.report, self.method = net, report, method
        self.strength: float | None = None

    def forward(self, blurred_BCHW: Tensor, kernels_BKK: Tensor) -> Tensor:
        """Return the deconvolved images (B, 3, H, W) in [0, 1]."""
        assert self.strength is not None, "on_test_start chooses the strength"
        return deconvolve(blurred_BCHW, kernels_BKK, self.method, self.strength)

    def on_test_start(self) -> None:
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        batches = [data.on_after_batch_transfer(batch, 0) for batch in data.val_dataloader()]

        def mean_psnr(strength: float) -> float:
            found = [psnr(deconvolve(p.blurred, p.kernels, self.method, strength), p.sharp) for p in batches]
            values_B = torch.cat(found)
            return float(values_B[values_B.isfinite()].mean())  # an image that equals the sharp one has no finite PSNR

        self.strength = max(STRENGTHS[self.method], key=mean_psnr)

    def on_test_epoch_start(self) -> None:
        self.report.start(self.trainer.datamodule.test_names)  # type: ignore[attr-defined]

    def test_step(self, pairs: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        def restore(images_BCHW: Tensor) -> Tensor:
            return self(images_BCHW, pairs.kernels[: len(images_BCHW)])

        self.report.add(dataloader_idx, pairs, restore(pairs.blurred), restore)

    def on_test_epoch_end(self) -> None:
        assert self.strength is not None
        self.log("chosen/strength", float(self.strength))
        self.log_dict(self.report.finish(self.trainer.default_root_dir))


def deconvolve(blurred_BCHW: Tensor, kernels_BKK: Tensor, method: str, strength: float) -> Tensor:
    """Deconvolve each channel of each image with its kernel.

    Args:
        blurred_BCHW: images in [0, 1].
        kernels_BKK: K odd, smaller than twice the images' sides, each of sum 1.
        method: see STRENGTHS.
        strength: its balance or number of iterations.
    """
    from skimage import restoration

    H, W = blurred_BCHW.shape[-2:]
    pad = max(
        kernels_BKK.shape[-1] // 2, min(H, W) // 2
    )  # what comes in from beyond the border gets further at each iteration
    extended = np.pad(blurred_BCHW.double().cpu().numpy(), ((0, 0), (0, 0), (pad, pad), (pad, pad)), mode="symmetric")
    one: Callable[[np.ndarray, np.ndarray], np.ndarray]
    if method == "wiener":

        def one(image_HW: np.ndarray, psf_KK: np.ndarray) -> np.ndarray:
            return restoration.wiener(image_HW, psf_KK, balance=strength, clip=False)

    else:

        def one(image_HW: np.ndarray, psf_KK: np.ndarray) -> np.ndarray:
            return restoration.richardson_lucy(image_HW, psf_KK, num_iter=int(strength), clip=False)

    kernels = kernels_BKK.double().cpu().numpy()
    restored = np.stack(
        [[one(channel, psf) for channel in image] for image, psf in zip(extended, kernels, strict=True)]
    )
    found = torch.from_numpy(restored[..., pad : pad + H, pad : pad + W])
    return found.clamp(0, 1).to(blurred_BCHW)
