"""Files are written whole to regular files, and only regular files of a known size are read."""

import os

import pytest

from ufom_runtime.files import DamagedFile, MissingFile, read_whole, write_whole
from ufom_theory import UfomError


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "link to a device"])
def test_what_is_not_a_regular_file_is_neither_written_nor_read(tmp_path, kind):
    path = tmp_path / "x"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero" if kind == "device" else tmp_path / "y")
        (tmp_path / "y").symlink_to("/dev/full")
    before = os.lstat(path)
    with pytest.raises(UfomError, match="is not a regular file: write to another path"):
        write_whole(path, b"new")
    assert os.lstat(path) == before
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(UfomError, match=r"not a regular file|Is a directory"):
        read_whole(path, 10)


def test_a_symbolic_link_stays_and_its_file_is_written(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "x").symlink_to("there/y")
    for content in (b"first", b"second"):  # at first the link points to nothing
        write_whole(tmp_path / "x", content)
        assert (tmp_path / "x").is_symlink()
        assert (tmp_path / "there" / "y").read_bytes() == content
    assert [p.name for p in (tmp_path / "there").iterdir()] == ["y"]


def test_links_in_a_circle_are_named(tmp_path):
    (tmp_path / "x").symlink_to(tmp_path / "y")
    (tmp_path / "y").symlink_to(tmp_path / "x")
    with pytest.raises(UfomError, match=r"x cannot be read: Too many levels"):
        read_whole(tmp_path / "x", 10)


def test_no_more_is_read_than_is_allowed(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"12345")
    assert read_whole(path, 5) == b"12345"
    with pytest.raises(DamagedFile, match="it has 5 bytes, more than 4; remove it"):
        read_whole(path, 4)
    with pytest.raises(MissingFile, match="cannot be read: No such file"):
        read_whole(tmp_path / "none", 4)


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs /proc")
def test_a_file_that_holds_more_than_it_says_is_refused(tmp_path):
    (tmp_path / "x").symlink_to("/proc/self/maps")
    with pytest.raises(DamagedFile, match="it holds more than the 0 bytes that it says"):
        read_whole(tmp_path / "x", 100)
