"""The readers on small archives made here (good and damaged), and on the real files where they are."""

import gzip
import io
import struct
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from tests.runtime.conftest import needs_data
from ufom_runtime.problems import data
from ufom_runtime.problems.few_shot import digits_few_shot, omniglot_few_shot, sample_episodes
from ufom_runtime.problems.hypercleaning import digits_hypercleaning, mnist_hypercleaning
from ufom_theory import UfomError


def idx(shape, body=None):
    head = bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape)
    return head + (bytes(range(int(np.prod(shape)))) if body is None else body)


def test_idx_round_trip(tmp_path):
    (tmp_path / "x.gz").write_bytes(gzip.compress(idx((2, 3, 4))))
    np.testing.assert_array_equal(data.read_idx(tmp_path / "x.gz"), np.arange(24).reshape(2, 3, 4))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not gzip", "cannot be read"),
        (gzip.compress(idx((2, 3)))[:-9], "cannot be read"),
        (gzip.compress(b""), "header reads nothing"),
        (gzip.compress(b"\0\0\x0d\x01"), "unsigned bytes"),
        (gzip.compress(b"\0\0\x08\x03\0\0"), "within its header"),
        (gzip.compress(idx((5, 5), b"abc")), "does not hold 25 bytes"),
        (gzip.compress(idx((2, 2), b"abcde")), "does not hold 4 bytes"),
        (gzip.compress(idx((2**31, 2**31, 9), b"")), "but does not hold"),
        (gzip.compress(idx((0, 2**31, 2**31), b"")), "but does not hold"),
        (b"\x1f\x8b\x08\x08" + b"x" * 2**17, "it is cut short"),
    ],
)
def test_damaged_idx_files_are_named(tmp_path, content, message):
    (tmp_path / "x.gz").write_bytes(content)
    with pytest.raises(UfomError, match=message) as caught:
        data.read_idx(tmp_path / "x.gz")
    assert "x.gz" in str(caught.value)


def png(size=(105, 105)):
    buffer = io.BytesIO()
    Image.new("1", size, 1).save(buffer, "PNG")
    return buffer.getvalue()


def archive(path, names, content):
    path.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(path, "w") as out:
        for name in names:
            out.writestr(name, content)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("UFOM_DATA", str(tmp_path))
    data.omniglot.cache_clear()
    data.mnist.cache_clear()
    yield tmp_path
    data.omniglot.cache_clear()
    data.mnist.cache_clear()


def test_missing_data_are_named(folder, monkeypatch):
    with pytest.raises(UfomError, match=r"train-images-idx3-ubyte\.gz is missing"):
        data.mnist()
    monkeypatch.setenv("UFOM_DATA", str(folder / "nowhere"))
    with pytest.raises(UfomError, match="not a folder"):
        data.mnist()
    monkeypatch.delenv("UFOM_DATA")
    with pytest.raises(UfomError, match="UFOM_DATA is not set"):
        data.omniglot()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (png(), "holds 1 characters"),
        (png((3, 3)), r"\(3, 3\)"),
        (b"no image", "not a readable PNG"),
        (b"x" * 2**17, "too many"),
    ],
)
def test_damaged_omniglot_is_named(folder, content, message):
    for number in (1, 2):
        name = f"images_background_small{number}/Greek/character01/0394_01.png"
        archive(folder / "omniglot" / f"images_background_small{number}.zip", [name], content)
    with pytest.raises(UfomError, match=message):
        data.omniglot()


def test_an_archive_that_is_none_is_named(folder):
    (folder / "omniglot").mkdir()
    (folder / "omniglot" / "images_background_small1.zip").write_bytes(b"PK but no zip")
    with pytest.raises(UfomError, match=r"small1\.zip cannot be read"):
        data.omniglot()


@needs_data
def test_omniglot_is_242_different_characters():
    images = data.omniglot()
    assert images.shape == (242, 20, 1, 28, 28)
    assert images.min() >= 0
    assert 0.9 < images.max() <= 1
    assert len(torch.unique(images.flatten(1), dim=0)) == 242
    problem = omniglot_few_shot(ways=5, filters=2)
    assert (len(problem.images), len(problem.test_images)) == (182, 60)


@needs_data
def test_rotations_make_four_classes_of_a_training_character():
    plain, turned = (omniglot_few_shot(ways=3, filters=2, rotations=turn) for turn in (False, True))
    assert (len(turned.images), len(turned.test_images)) == (4 * 182, 60)
    assert torch.equal(turned.images[:182], plain.images)
    assert torch.equal(turned.test_images, plain.test_images)
    image = plain.images[5, 3, 0]
    for turns in range(4):
        found = turned.images[turns * 182 + 5, 3, 0]
        assert torch.equal(found, torch.from_numpy(np.rot90(image.numpy(), turns).copy()))
    assert len(torch.unique(turned.images[:, 0].flatten(1), dim=0)) == 4 * 182


@needs_data
def test_mnist_is_whole():
    images, labels, test_images, test_labels = data.mnist()
    assert (images.shape, test_images.shape) == ((60_000, 784), (10_000, 784))
    assert images.max() == 1.0
    assert labels.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert len(test_labels) == 10_000


@needs_data
def test_mnist_hypercleaning_splits_do_not_overlap():
    problem = mnist_hypercleaning(n_train=300, n_validation=200, hidden=4, r=2)
    train, given, validation, _ = (t[0] for t in problem.tasks)
    assert (train.shape, validation.shape, len(problem.test_images)) == ((300, 784), (200, 784), 10_000)
    assert len(torch.unique(torch.cat([train, validation]), dim=0)) == 500
    assert given.shape == (300,)


def test_half_of_the_labels_are_corrupted_and_all_of_those_wrong():
    problem = digits_hypercleaning(n_train=400, n_validation=300, hidden=4, r=2)
    images, labels = data.digits()
    lookup = {tuple(image.tolist()): int(label) for image, label in zip(images, labels, strict=True)}
    train, given = problem.tasks[0][0], problem.tasks[1][0]
    true = torch.tensor([lookup[tuple(x.tolist())] for x in train])
    assert torch.equal(given != true, problem.corrupted)
    assert int(problem.corrupted.sum()) == 200
    assert len(problem.test_images) == 1797 - 700


def test_episodes_hold_different_drawings_of_different_classes():
    images = torch.arange(7 * 5).reshape(7, 5, 1, 1, 1).float()  # class = value // 5
    x, y, x_test, y_test = sample_episodes(images, 50, 3, 2, torch.Generator().manual_seed(0))
    assert x.shape == (50, 6, 1, 1, 1)
    assert x_test.shape == (50, 3, 1, 1, 1)
    for i in range(50):
        shown = [*x[i].flatten().tolist(), *x_test[i].flatten().tolist()]
        assert len(set(shown)) == 9
        classes = {
            int(c): {v // 5 for v, k in zip(x[i].flatten().tolist(), y[i].tolist(), strict=True) if k == c}
            for c in range(3)
        }
        assert all(len(v) == 1 for v in classes.values())
        assert [v // 5 for v in x_test[i].flatten().tolist()] == [next(iter(classes[int(c)])) for c in y_test[i]]
        assert len(set.union(*classes.values())) == 3


@pytest.mark.parametrize(
    "call",
    [
        lambda: digits_few_shot(ways=11),
        lambda: digits_few_shot(shots=0),
        lambda: digits_few_shot(r=0),
        lambda: digits_hypercleaning(n_train=0),
        lambda: digits_hypercleaning(n_train=1000, n_validation=797),
    ],
)
def test_sizes_that_do_not_fit_are_refused(call):
    with pytest.raises(UfomError, match=r"give|at least"):
        call()


@pytest.mark.parametrize("at", [33, 8])
def test_a_drawing_that_decodes_to_more_than_its_first_bytes_say_is_refused(tmp_path, monkeypatch, at):
    """A chunk before IHDR shifts it, and a second IHDR counts in the first one's place."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    def header(size):
        return chunk(b"IHDR", struct.pack(">IIBBBBB", size, size, 8, 0, 0, 0, 0))

    mark, pixels = b"\x89PNG\r\n\x1a\n", zlib.compress(bytes(4001 * 4000))
    small, large = header(105), header(4000)
    content = mark + (small + large if at == 33 else chunk(b"tEXt", b"\0" * 4 + struct.pack(">II", 105, 105)) + large)
    content += chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.png", content)
    with zipfile.ZipFile(path) as archive, pytest.raises(UfomError, match=r"x\.png is \(4000, 4000\), not \(105"):
        data._read_png(path, archive, archive.infolist()[0])


@pytest.mark.parametrize("flag", [8, 16])
def test_no_member_of_a_gzip_may_hide_behind_the_first(tmp_path, flag):
    whole = gzip.compress(b"\0\0\x08\x01\0\0\0\x01x")
    (tmp_path / "x.gz").write_bytes(whole + whole[:3] + bytes([flag]) + whole[4:10] + b"x" * 2**24)
    with pytest.raises(UfomError, match="more follows its end"):
        data.read_idx(tmp_path / "x.gz")
