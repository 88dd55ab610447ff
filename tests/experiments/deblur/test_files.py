"""Which files are taken, what they will be called, and what is refused before anything is written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from rich.console import Console

from datamodules.face_photos import Refused
from experiments.deblur.files import SHOWN, Outcome, check_outputs, collect, each_of
from experiments.errors import UserError


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    names = "a.jpg a.png b/a.jpg b/c/d.JPEG b/notes.txt .hidden/e.jpg b/.f.jpg weird[1].png"
    for name in names.split():
        file = tmp_path / "in" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(name)
    return tmp_path / "in"


def names(words: list[str], out: Path) -> list[str]:
    return [each.name.as_posix() for each in collect(words, out)]


def test_a_folder_is_searched_and_paths_below_it_are_kept(tree: Path) -> None:
    assert names([str(tree)], tree.parent / "out") == ["a.jpg", "a.png", "b/a.jpg", "b/c/d.JPEG", "weird[1].png"]


def test_files_folders_and_patterns(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert names([f"{tree}/a.jpg"], out) == ["a.jpg"]
    assert names([f"{tree}/b/notes.txt"], out) == ["notes.txt"]  # what is named is tried
    assert names([f"{tree}/weird[1].png"], out) == ["weird[1].png"]  # a file before a pattern
    assert names([f"{tree}/*.jpg"], out) == ["a.jpg"]
    assert names([f"{tree}/**/*.jpg"], out) == ["a.jpg", "b/a.jpg"]
    assert names([f"{tree}/?"], out) == ["b/a.jpg", "b/c/d.JPEG"]
    assert names([f"{tree}/b", f"{tree}/a.jpg"], out) == ["a.jpg", "b/a.jpg", "b/c/d.JPEG"]
    assert names([f"{tree}/a.jpg", f"{tree}/./a.jpg"], out) == ["a.jpg"]


def test_what_an_earlier_run_wrote_is_not_taken_again(tree: Path) -> None:
    assert names([str(tree)], tree / "b") == ["a.jpg", "a.png", "weird[1].png"]
    assert "b/a.jpg" in names([str(tree)], tree.parent)


def test_what_is_not_there_or_would_meet_is_refused(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"there is no nowhere.jpg"):
        collect(["nowhere.jpg"], out)
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"there is no photograph in .*none.*known suffixes: .avif"):
        collect([str(tmp_path / "none")], out)
    with pytest.raises(UserError, match="leads out of the folder"):
        collect([f"{tree}/b*/../a.jpg"], out)
    with pytest.raises(UserError, match=r"would both become a.jpg"):
        collect([f"{tree}/a.jpg", f"{tree}/b/a.jpg"], out)


def test_an_input_is_never_an_output_by_whatever_links(tree: Path, tmp_path: Path) -> None:
    file, other = tree / "a.jpg", tree / "a.png"
    symbolic, hard = tmp_path / "s.jpg", tmp_path / "h.jpg"
    symbolic.symlink_to(file)
    os.link(file, hard)
    (tmp_path / "alias").symlink_to(tree)
    for target in (file, symbolic, hard, tmp_path / "alias" / "a.jpg", tree / "b" / ".." / "a.jpg"):
        with pytest.raises(UserError, match=r"would overwrite the input .*a.jpg"):
            check_outputs([other, file], [tmp_path / "new.jpg", target], force=True)
    dangling = tmp_path / "dangling.jpg"
    dangling.symlink_to(tmp_path / "gone.jpg")
    check_outputs([file], [dangling], force=True)
    with pytest.raises(UserError, match="exist already"):
        check_outputs([file], [dangling], force=False)


def test_outputs_that_exist_meet_or_cannot_be_are_refused(tree: Path, tmp_path: Path) -> None:
    file = tree / "a.jpg"
    with pytest.raises(UserError, match=r"1 of 2 outputs exist already \(.*a.png\); --force replaces them"):
        check_outputs([file], [tree / "a.png", tree / "z.png"], force=False)
    check_outputs([file], [tree / "a.png", tree / "z.png"], force=True)
    with pytest.raises(UserError, match="the same file"):
        check_outputs([file], [tmp_path / "x.png", tmp_path / "y" / ".." / "x.png"], force=True)
    with pytest.raises(UserError, match="would have to be a file, but is a folder"):
        check_outputs([file], [tree / "b"], force=True)
    with pytest.raises(UserError, match="would have to be a folder, but is a file"):
        check_outputs([file], [tree / "a.png" / "x" / "y.png"], force=True)


def test_one_that_fails_stops_no_other() -> None:
    def work(each: int, tick) -> None:
        tick(1)
        if each == 1:
            raise Refused("truncated", "12 bytes short")
        if each == 2:
            raise RuntimeError("CUDA out of memory, tried to\nallocate")
        if each == 3:
            raise OSError("disk full")

    console = Console(record=True, width=200, force_terminal=False)
    outcome = each_of(range(5), work, lambda each: f"[{each}].jpg", console)
    assert outcome.done == 2
    assert outcome.failed == [
        ("[1].jpg", "truncated: 12 bytes short"),
        ("[2].jpg", "out of memory; give a smaller --tile"),
        ("[3].jpg", "OSError: disk full"),
    ]
    assert outcome.show(console, "photographs written") == 1
    said = console.export_text()
    assert "photographs written: 2; failed: 3" in said
    assert "failed: [1].jpg: truncated: 12 bytes short" in said


def test_a_long_list_is_cut_and_its_length_said() -> None:
    console = Console(record=True, width=200)
    outcome = Outcome(done=50, notes=[(f"{i}.jpg", "no face") for i in range(SHOWN + 7)])
    assert outcome.show(console, "photographs written") == 0
    assert "note: and 7 more" in console.export_text()
