"""What a camera makes of light: tone curve, saturation, photon and read-out noise, 8 bits, JPEG.

Legend: B batch, C channels, H height, W width, N = C * H * W, K kernel side.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from datamodules.blur_convolve import Boundary, convolve
from datamodules.blur_motion import as_tuple, check_range
from datamodules.counter_random import Stream, normal, poisson, uniform

Gamma = float | Literal["srgb"] | None
TOE = 1e-6  # below this light the power law is continued by a straight line, whose slope is finite at 0


@dataclass(frozen=True)
class Camera:
    """What happens to light on its way to the file, apart from motion. By default nothing but the convolution.

    Args:
        gamma: of the images: light = value ** gamma, or "srgb" for its piecewise curve. Blur adds light up, so bright points
            leave bright streaks. None blurs the values themselves, as DeblurGAN and face deblurring since have done.
        highlights: range of a factor by which light near white is raised before the blur, where the sensor of the
            sharp image cut it off;
            full at white, none below 0.9 of it.
        photons: mean count at white; counts are Poisson, in light. None for no such noise.
        noise_sigma: range of the standard deviation of Gaussian noise, added to the values, in units of white.
        quantise: round to 8 bits.
        jpeg: range of JPEG qualities, compressed and read again on CPU by Pillow; None for none.
        boundary: as in `convolve`; with "valid" compare with `valid_part` of the sharp image.
    Raises:
        ValueError: what no camera can do, naming the field.
    """

    gamma: Gamma = None
    highlights: tuple[float, float] = (1.0, 1.0)
    photons: float | None = None
    noise_sigma: tuple[float, float] = (0.0, 0.0)
    quantise: bool = False
    jpeg: tuple[int, int] | None = None
    boundary: Boundary = "reflect"

    def __post_init__(self) -> None:
        for name in ("highlights", "noise_sigma", "jpeg"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, as_tuple(name, value))
        power = isinstance(self.gamma, (int, float)) and self.gamma > 0
        if not (self.gamma is None or self.gamma == "srgb" or power):
            raise ValueError(f"gamma must be above 0, 'srgb' or null, got {self.gamma!r}")
        check_range("highlights", self.highlights, 1, 1e6)
        check_range("noise_sigma", self.noise_sigma, 0, 10)
        if self.jpeg is not None:
            check_range("jpeg", self.jpeg, 1, 100)
        if self.photons is not None and not 0 < self.photons < 1e12:
            raise ValueError(f"photons must lie between 0 and 1e12, or be null for no photon noise, got {self.photons}")
        if self.boundary not in get_args(Boundary):
            raise ValueError(f"unknown boundary {self.boundary!r}; known: {', '.join(get_args(Boundary))}")


CAMERAS: dict[str, Camera] = {
    "ideal": Camera(),
    # Blur of the values, then noise: the convention of the deblurring papers.
    "sensor": Camera(noise_sigma=(0.0, 0.015), quantise=True),
    "light": Camera(gamma=2.2, noise_sigma=(0.0, 0.015), quantise=True),
    "night": Camera(gamma="srgb", highlights=(1.0, 4.0), photons=2048, noise_sigma=(0.0, 0.015), quantise=True),
}


def photograph(sharp_BCHW: Tensor, kernels_BKK: Tensor, camera: Camera, keys_B: Tensor) -> Tensor:
    """Photograph sharp images with moving cameras: to light, blur, count photons, back, noise, 8 bits; all in [0, 1].

    The gradient passes counting, rounding and JPEG as if they were not there, and nothing where values are clipped.

    Args:
        sharp_BCHW: floating, in [0, 1]; computed in float32 at least.
        kernels_BKK: see `motion_kernels`.
        keys_B: the same keys give the same noise.
    Returns:
        As the input; smaller for boundary="valid".
    Raises:
        ValueError: keys that are not one per image; values outside [0, 1]; see `convolve` and `jpeg`.
    """
    if len(keys_B) != len(sharp_BCHW):
        raise ValueError(f"there must be a key per image, got {len(keys_B)} keys for {len(sharp_BCHW)} images")
    if sharp_BCHW.numel() and not bool((sharp_BCHW >= 0).all() & (sharp_BCHW <= 1).all()):
        found = f"{float(sharp_BCHW.min()):g} to {float(sharp_BCHW.max()):g}"
        raise ValueError(f"images must lie in [0, 1], got {found}; map [-1, 1] by (x + 1) / 2, or clamp")
    keys_B = keys_B.to(sharp_BCHW.device)
    draws_B3 = uniform(keys_B, 3, Stream.CAMERA)
    dtype = torch.promote_types(sharp_BCHW.dtype, torch.float32)
    light_BCHW = to_linear(sharp_BCHW.to(dtype), camera.gamma)
    if camera.highlights != (1.0, 1.0):
        near_white_BCHW = ((light_BCHW - 0.9) * 10).clamp(0, 1)
        light_BCHW = light_BCHW * (1 + (_within(camera.highlights, draws_B3[:, 0]) - 1) * near_white_BCHW)
    light_BCHW = convolve(light_BCHW, kernels_BKK, camera.boundary).clamp(0, 1)
    if camera.photons is not None:
        counts_BN = poisson(keys_B, light_BCHW.flatten(1).double() * camera.photons, Stream.PHOTONS)
        counted_BCHW = (counts_BN / camera.photons).clamp(0, 1).to(light_BCHW).view_as(light_BCHW)
        light_BCHW = _straight_through(light_BCHW, counted_BCHW)
    seen_BCHW = to_display(light_BCHW, camera.gamma)
    if camera.noise_sigma[1] > 0:
        noise_BN = normal(keys_B, seen_BCHW.shape[1:].numel(), Stream.NOISE).to(seen_BCHW)
        sigma_B111 = _within(camera.noise_sigma, draws_B3[:, 1]).to(seen_BCHW)
        seen_BCHW = (seen_BCHW + sigma_B111 * noise_BN.view(seen_BCHW.shape)).clamp(0, 1)
    if camera.quantise:
        seen_BCHW = _straight_through(seen_BCHW, (seen_BCHW * 255).round() / 255)
    if camera.jpeg is not None:
        low, high = camera.jpeg
        quality_B = low + (draws_B3[:, 2] * (high - low + 1)).long()
        seen_BCHW = _straight_through(seen_BCHW, jpeg(seen_BCHW, quality_B))
    return seen_BCHW.to(sharp_BCHW.dtype)


def to_linear(values: Tensor, gamma: Gamma) -> Tensor:
    """Return the light, in [0, 1], that displayed values in [0, 1] stand for.

    Source: IEC 61966-2-1 for "srgb".
    """
    if gamma is None:
        return values
    if gamma == "srgb":
        curved = ((values.clamp_min(0.04045) + 0.055) / 1.055) ** 2.4
        return torch.where(values <= 0.04045, values / 12.92, curved)
    toe = TOE ** (1 / gamma)
    return torch.where(values <= toe, values * (TOE / toe), values.clamp_min(toe) ** gamma)


def to_display(light: Tensor, gamma: Gamma) -> Tensor:
    """Return the values that stand for light: the inverse of `to_linear`."""
    if gamma is None:
        return light
    if gamma == "srgb":
        curved = 1.055 * light.clamp_min(0.0031308) ** (1 / 2.4) - 0.055
        return torch.where(light <= 0.0031308, light * 12.92, curved)
    return torch.where(light <= TOE, light * (TOE ** (1 / gamma) / TOE), light.clamp_min(TOE) ** (1 / gamma))


def jpeg(images_BCHW: Tensor, quality_B: Tensor) -> Tensor:
    """Compress images in [0, 1] as JPEG and read them again, by Pillow on CPU; without a gradient, a multiple of 1 / 255.

    Raises:
        ValueError: a number of channels other than 1 or 3.
    """
    from PIL import Image

    if images_BCHW.shape[1] not in (1, 3):
        raise ValueError(f"JPEG takes 1 or 3 channels, got images of {images_BCHW.shape[1]}")
    read = [images_BCHW.new_zeros(0, *images_BCHW.shape[1:])]
    bytes_BHWC = (images_BCHW.detach() * 255).round().clamp(0, 255).byte().movedim(1, -1).cpu().numpy()
    for image_HWC, quality in zip(bytes_BHWC, quality_B.tolist(), strict=True):
        file = io.BytesIO()
        Image.fromarray(image_HWC[..., 0] if image_HWC.shape[-1] == 1 else image_HWC).save(
            file, "jpeg", quality=quality
        )
        decoded = torch.frombuffer(bytearray(Image.open(file).tobytes()), dtype=torch.uint8)
        read.append(decoded.view(1, *image_HWC.shape).movedim(-1, 1).to(images_BCHW) / 255)
    return torch.cat(read)


def _within(bounds: tuple[float, float], u_B: Tensor) -> Tensor:
    """Return numbers uniform in a range, one per image, (B, 1, 1, 1)."""
    return (bounds[0] + (bounds[1] - bounds[0]) * u_B)[:, None, None, None]


def _straight_through(x: Tensor, value: Tensor) -> Tensor:
    """Return `value`, to the bit, with the gradient of x."""
    return value.detach() + (x - x.detach()) if x.requires_grad else value
