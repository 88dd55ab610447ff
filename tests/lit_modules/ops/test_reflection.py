"""Images are extended by their mirror images and cut back to themselves."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lit_modules.ops.reflection import cut_back, padded_size, reflect_to_multiple


@pytest.mark.parametrize(("H", "W", "multiple"), [(13, 18, 8), (5, 4, 4), (9, 31, 16), (3, 2, 2)])
def test_it_is_torchs_reflection(H: int, W: int, multiple: int) -> None:
    x = torch.rand(2, 3, H, W)
    padded = F.pad(x, (0, -W % multiple, 0, -H % multiple), mode="reflect")
    assert torch.equal(reflect_to_multiple(x, multiple), padded)


def test_mirror_images_follow_one_another_where_one_is_not_enough() -> None:
    row = torch.tensor([0.0, 1.0, 2.0]).expand(1, 1, 1, 3)
    wide = reflect_to_multiple(row, 1, 11)
    assert wide.shape == (1, 1, 11, 11)
    assert wide[0, 0, 0].tolist() == [0, 1, 2, 1, 0, 1, 2, 1, 0, 1, 2]
    assert (wide == wide[:, :, :1]).all()  # of one row, every row is the mirror


@pytest.mark.parametrize("multiple", [1, 4, 8])
@pytest.mark.parametrize("least", [1, 6, 8])
def test_the_size_is_the_smallest_that_will_do(multiple: int, least: int) -> None:
    for size in range(1, 30):
        padded = padded_size(size, multiple, least)
        assert padded % multiple == 0
        assert padded >= max(size, least) > padded - multiple


def test_the_image_comes_back() -> None:
    x = torch.rand(2, 3, 7, 10)
    assert torch.equal(cut_back(reflect_to_multiple(x, 8), 7, 10), x)
    whole = torch.rand(2, 3, 16, 8)
    assert reflect_to_multiple(whole, 8) is whole


def test_gradients_of_mirrored_pixels_add_up() -> None:
    x = torch.rand(1, 1, 3, 3, requires_grad=True)
    reflect_to_multiple(x, 4).sum().backward()  # rows 0 1 2 1, columns 0 1 2 1
    times = torch.tensor([1.0, 2.0, 1.0])
    assert x.grad is not None
    assert torch.equal(x.grad[0, 0], times[:, None] * times)
