"""The judge on procedural faces: MTCNN's traps, its memory, and that blur costs detections."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from datamodules import face_detector
from datamodules.face_align import margin_of
from datamodules.face_detector import as_bytes, detect_faces, enlarge
from datamodules.procedural_faces import draw_face
from lit_modules.face_drawing import draw_faces
from lit_modules.face_judge import FaceJudge
from lit_modules.ops.detection import Faces, indicators, no_faces

SIZE, N = 64, 12


@pytest.fixture(scope="module")
def faces_BCHW() -> torch.Tensor:
    cut = slice(margin_of(SIZE), margin_of(SIZE) + SIZE)
    drawn = np.stack([draw_face("test", i, SIZE).pixels_HW3[cut, cut] for i in range(N)])
    return torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 255


@pytest.fixture(scope="module")
def judge() -> FaceJudge:
    return FaceJudge()


def test_procedural_faces_are_found_once_where_they_were_drawn(faces_BCHW: torch.Tensor, judge: FaceJudge) -> None:
    found = judge.detect(faces_BCHW)
    assert [len(faces) for faces in found] == [1] * N
    for index, faces in enumerate(found):
        known = torch.from_numpy(draw_face("test", index, SIZE).points_52 - margin_of(SIZE)).float()
        assert (faces.points_F52[0] - known).norm(dim=-1).max() < 0.2 * SIZE / 4  # a fifth of the distance between eyes
        x0, y0, x1, y1 = faces.boxes_F4[0].tolist()
        assert ((known[:, 0] > x0) & (known[:, 0] < x1) & (known[:, 1] > y0) & (known[:, 1] < y1)).all()


def test_what_is_found_is_in_the_pixels_of_the_image_as_given(faces_BCHW: torch.Tensor) -> None:
    larger = F.interpolate(as_bytes(faces_BCHW[:3]).float(), scale_factor=2, mode="bilinear").round() / 255
    for small, large in zip(FaceJudge().detect(faces_BCHW[:3]), FaceJudge().detect(larger), strict=True):
        assert torch.allclose(2 * (small.boxes_F4 + 0.5), large.boxes_F4 + 0.5, atol=1e-3)
        assert torch.allclose(2 * (small.points_F52 + 0.5), large.points_F52 + 0.5, atol=1e-3)


def test_an_image_is_judged_alike_alone_and_in_any_batch(faces_BCHW: torch.Tensor, judge: FaceJudge) -> None:
    together, alone = judge.detect(faces_BCHW), [judge.detect(image[None])[0] for image in faces_BCHW]
    chunked = FaceJudge(chunk=5).detect(faces_BCHW)
    for a, b, c in zip(together, alone, chunked, strict=True):
        assert len(a) == len(b) == len(c)
        assert torch.allclose(a.boxes_F4, b.boxes_F4, atol=0.02)
        assert torch.allclose(a.boxes_F4, c.boxes_F4, atol=0.02)
        assert torch.allclose(a.probs_F, b.probs_F, atol=1e-4)


def test_the_same_images_give_the_same_bits_twice_also_under_autocast(
    faces_BCHW: torch.Tensor, judge: FaceJudge
) -> None:
    first = judge.detect(faces_BCHW[:4])
    with torch.autocast("cpu", torch.bfloat16):
        second = judge.detect(faces_BCHW[:4])
    assert all(torch.equal(a.boxes_F4, b.boxes_F4) for a, b in zip(first, second, strict=True))


def test_nets_first_used_in_inference_mode_serve_outside_it(faces_BCHW: torch.Tensor) -> None:
    face_detector._nets.cache_clear()
    with torch.inference_mode():
        inside = detect_faces(faces_BCHW[:1])
    outside = detect_faces(faces_BCHW[:1])
    assert torch.equal(inside[0].boxes_F4, outside[0].boxes_F4)
    assert not any(weight.is_inference() for weight in face_detector._nets(torch.device("cpu")).parameters())


def test_the_callers_precision_is_given_back(faces_BCHW: torch.Tensor) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        detect_faces(faces_BCHW[:1])
        assert torch.get_float32_matmul_precision() == "medium"
        with pytest.raises(ValueError, match="got shape"):
            detect_faces(faces_BCHW[0])
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_what_every_run_looks_at_is_kept_in_a_file(
    faces_BCHW: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATA_ROOT", str(tmp_path))
    mixed = torch.stack([torch.zeros(3, SIZE, SIZE), faces_BCHW[0], faces_BCHW[1]])
    found, first = FaceJudge().detect(mixed), FaceJudge().detect_kept(mixed)
    assert [file.suffix for file in sorted((tmp_path / "detections").iterdir())] == [".lock", ".npz"]
    monkeypatch.setattr("lit_modules.face_judge.detect_faces", None)
    again = FaceJudge().detect_kept(mixed)
    for faces, others, same in zip(found, first, again, strict=True):
        assert len(faces) == len(others) == len(same)
        assert torch.equal(faces.boxes_F4, others.boxes_F4)
        assert torch.equal(faces.points_F52, same.points_F52)
        assert torch.equal(faces.probs_F, same.probs_F)
    assert FaceJudge().detect_kept(mixed[:0]) == []


def test_no_face_is_an_empty_answer_not_an_error(judge: FaceJudge) -> None:
    noise = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    flat = torch.stack([torch.zeros(3, SIZE, SIZE), torch.ones(3, SIZE, SIZE)])
    for faces in judge.detect(torch.cat([flat, noise])):
        assert len(faces) == 0
        assert faces.boxes_F4.shape == (0, 4)
        assert faces.points_F52.shape == (0, 5, 2)
    assert judge.detect(torch.zeros(0, 3, SIZE, SIZE)) == []


def test_faces_among_images_without_are_told_apart(faces_BCHW: torch.Tensor, judge: FaceJudge) -> None:
    mixed = torch.stack([torch.zeros(3, SIZE, SIZE), faces_BCHW[0], torch.ones(3, SIZE, SIZE), faces_BCHW[1]])
    assert [len(faces) for faces in judge.detect(mixed)] == [0, 1, 0, 1]


def test_blur_costs_detections_and_the_indicators_say_so(faces_BCHW: torch.Tensor, judge: FaceJudge) -> None:
    line = torch.zeros(3, 1, 1, 21)
    line[..., 4:17] = 1 / 13  # 13 pixels, a fifth of the side
    blurred = F.conv2d(F.pad(faces_BCHW, (10, 10, 0, 0), mode="reflect"), line, groups=3)
    sharp = indicators(judge.score(faces_BCHW, faces_BCHW))
    floor = indicators(judge.score(blurred, faces_BCHW))
    assert (sharp["detected_0.7"], sharp["iou"], sharp["landmark_error"], sharp["n"]) == (1, 1, 0, N)
    for name in ("detected_0.9", "prob", "iou"):
        assert floor[name] < sharp[name] - 0.1
    assert floor["n"] == N


def test_sharp_images_are_looked_at_once(faces_BCHW: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []

    def counting(images: torch.Tensor, **options: int) -> list[Faces]:
        looked.append(len(images))
        return detect_faces(images, **options)

    monkeypatch.setattr("lit_modules.face_judge.detect_faces", counting)
    judge = FaceJudge()
    first = judge.detect_sharp(faces_BCHW[:3])
    again = judge.detect_sharp(faces_BCHW[[2, 0, 3]])
    assert looked == [3, 1]
    assert again[0] is first[2]
    assert again[1] is first[0]


def test_the_judge_is_no_part_of_a_model() -> None:
    class Holder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.judge = FaceJudge()
            self.judge.detect(torch.zeros(1, 3, SIZE, SIZE))

    assert list(Holder().state_dict()) == []


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.zeros(2, 64, 64, 3), r"must be RGB \(B, 3, H, W\), got shape \(2, 64, 64, 3\)"),
        (torch.zeros(3, 64, 64), "got shape"),
        (torch.full((1, 3, 64, 64), 128.0), "must lie in .0, 1., got values from 128 to 128"),
        (torch.linspace(-1, 1, 3 * 64 * 64).reshape(1, 3, 64, 64), "got values from -1 to 1"),
        (torch.full((1, 3, 64, 64), float("nan")), "nan"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.int64), "uint8 or floating"),
    ],
)
def test_images_of_another_layout_or_range_are_refused(images: torch.Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        FaceJudge().detect(images)


def test_sizes_below_a_face_are_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match="12 x 30 pixels hold no face of 20: enlarge them first"):
        detect_faces(torch.zeros(1, 3, 12, 30))
    with pytest.raises(ValueError, match="at least 40"):
        FaceJudge(side=30)
    with pytest.raises(ValueError, match="differ in shape"):
        FaceJudge().score(torch.zeros(1, 3, 64, 64), torch.zeros(2, 3, 64, 64))
    assert len(FaceJudge().detect(torch.zeros(1, 3, 8, 8))) == 1  # the judge enlarges


def test_overshoot_is_clipped_as_saving_does_and_values_are_rounded() -> None:
    values = torch.tensor([-0.1, 0.0, 0.5, 0.999, 1.2]).expand(1, 3, 1, 5)
    assert as_bytes(values)[0, 0, 0].tolist() == [0, 0, 128, 255, 255]
    assert torch.equal(as_bytes(as_bytes(values)), as_bytes(values))


def test_larger_images_are_left_as_they_are() -> None:
    image = torch.zeros(1, 3, 130, 200, dtype=torch.uint8)
    assert enlarge(image, 128) == (image, 1.0)
    larger, scale = enlarge(image[..., :100, :50], 128)
    assert (tuple(larger.shape[-2:]), scale) == ((256, 128), 2.56)


def test_weights_come_from_the_package_and_are_loaded_once() -> None:
    nets = face_detector._nets(torch.device("cpu"))
    assert nets is face_detector._nets(torch.device("cpu"))
    assert sum(weight.numel() for weight in nets.parameters()) == 495_850  # P-, R- and O-Net


def test_boxes_probability_and_points_are_drawn_where_they_are() -> None:
    image = torch.zeros(3, 64, 64)
    points = torch.tensor([[20.0, 30], [40, 30], [30, 38], [24, 46], [38, 46]])
    faces = Faces(torch.tensor([[10.0, 16, 50, 58]]), torch.tensor([0.9996]), points[None])
    picture = draw_faces(image, faces, side=192)
    assert picture.size == (192, 192)
    green, yellow = (40, 230, 90), (255, 210, 0)
    assert picture.getpixel((31, 120)) == green  # the left edge: (10 + 1/2) * 3
    assert picture.getpixel((151, 120)) == green
    assert all(picture.getpixel((int((x + 0.5) * 3), int((y + 0.5) * 3))) == yellow for x, y in points.tolist())
    inside = np.asarray(picture)[60:80, 40:140].reshape(-1, 3)
    assert not (inside == green).all(1).any()
    above = np.asarray(picture)[30:49, 31:100].reshape(-1, 3)  # where the probability is written
    assert (above == green).all(1).any()


def test_an_image_without_a_face_says_so_and_bad_ones_are_refused() -> None:
    picture = np.asarray(draw_faces(torch.zeros(3, 32, 48, dtype=torch.uint8), no_faces(), side=96))
    assert picture.shape == (64, 96, 3)
    assert picture[..., 1].max() > 150  # green letters on black
    with pytest.raises(ValueError, match=r"got shape \(1, 3, 8, 8\)"):
        draw_faces(torch.zeros(1, 3, 8, 8), no_faces())
    with pytest.raises(ValueError, match="at least 32"):
        draw_faces(torch.zeros(3, 8, 8), no_faces(), side=8)
