"""Photographs of sharp images through a moving camera: draw kernels, convolve, and what the sensor adds.

    keys_B = key_of(seed, "train", indices, epoch)
    sharp_BCHW = augment(clean_BCHW, keys_B, Augmentation(brightness=0.1))
    kernels_BKK = motion_kernels(preset("training"), keys_B, side=64)
    blurred_BCHW = photograph(sharp_BCHW, kernels_BKK, CAMERAS["sensor"], keys_B)

Everything random is a pure function of the keys, see `datamodules.counter_random`. Kernels have the same bits whatever the
batch and the device; images only to rounding, for torch's convolutions and transforms differ between devices and shapes.

Legend: B batch, C channels, H height, W width, K kernel side.
"""

from __future__ import annotations

from datamodules.blur_augment import Augmentation, augment
from datamodules.blur_camera import CAMERAS, Camera, jpeg, photograph, to_display, to_linear
from datamodules.blur_convolve import convolve, valid_part
from datamodules.blur_kernels import crop_kernels, embed_kernels, kernel_extent, kernel_size, motion_kernels, rasterise
from datamodules.blur_motion import PRESETS, Draw, Motion, draw, of_face, preset
from datamodules.blur_paths import exposed, trajectories
from datamodules.counter_random import key_of

__all__ = [
    "CAMERAS",
    "PRESETS",
    "Augmentation",
    "Camera",
    "Draw",
    "Motion",
    "augment",
    "convolve",
    "crop_kernels",
    "draw",
    "embed_kernels",
    "exposed",
    "jpeg",
    "kernel_extent",
    "kernel_size",
    "key_of",
    "motion_kernels",
    "of_face",
    "photograph",
    "preset",
    "rasterise",
    "to_display",
    "to_linear",
    "trajectories",
    "valid_part",
]
