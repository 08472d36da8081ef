"""The readers on files of other content and on damaged ones, and on the real files where they are."""

import gzip
import zipfile

import numpy as np
import pytest
import torch

from tests.runtime.conftest import needs_data
from ufom_runtime.problems import data, sources
from ufom_runtime.problems.few_shot import digits_few_shot, omniglot_few_shot, sample_episodes
from ufom_runtime.problems.hypercleaning import digits_hypercleaning, mnist_hypercleaning
from ufom_theory import UfomError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("UFOM_DATA", str(tmp_path))
    for load in (data.mnist, data.omniglot, data.cifar100):
        load.cache_clear()
    yield tmp_path
    for load in (data.mnist, data.omniglot, data.cifar100):
        load.cache_clear()


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
    ("load", "file"),
    [
        (data.mnist, "mnist/train-images-idx3-ubyte.gz"),
        (data.omniglot, "omniglot/images_background_small1.zip"),
        (data.cifar100, "cifar100/cifar-100-binary.tar.gz"),
    ],
)
def test_a_file_of_other_content_is_refused_before_it_is_parsed(folder, monkeypatch, load, file):
    def parse(*arguments, **options):
        raise AssertionError

    for module, name in ((data.np, "frombuffer"), (data, "_read_png"), (data.tarfile, "open")):
        monkeypatch.setattr(module, name, parse)
    (folder / file).parent.mkdir()
    if file.endswith("zip"):
        zipped(folder / file, {"images_background_small1/Greek/character01/0394_01.png": b"no image"})
    else:
        (folder / file).write_bytes(gzip.compress(b"other"))
    name = file.rpartition("/")[2]
    with pytest.raises(UfomError, match=rf"{name} is not the original file: \w+ [0-9a-f]+ instead of [0-9a-f]+; fetch"):
        load()


def zipped(path, files, kind=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", kind) as out:
        for name, content in files.items():
            out.writestr(name, content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not gzip", "cannot be read"),
        (gzip.compress(b"content")[:-9], "it is cut short"),
        (b"\x1f\x8b\x08\x08" + b"x" * 2**17, "it is cut short"),
        (gzip.compress(b"content") * 2, "more follows its end"),
        (gzip.compress(bytes(10**6 + 1)), "decodes to more than 1000000 bytes"),
    ],
)
def test_damaged_gzips_are_named(tmp_path, monkeypatch, content, message):
    monkeypatch.setattr(sources, "MOST_BYTES", 10**6)
    (tmp_path / "x.gz").write_bytes(content)
    with pytest.raises(UfomError, match=rf"x\.gz .*{message}"):
        sources.content_digest(tmp_path / "x.gz")


def test_damaged_zips_are_named(tmp_path, monkeypatch):
    path = tmp_path / "x.zip"

    def refuse(message):
        with pytest.raises(UfomError, match=rf"x\.zip .*{message}"):
            sources.content_digest(path)

    path.write_bytes(b"PK but no zip")
    refuse("cannot be read")
    zipped(path, {"a": bytes(99)}, zipfile.ZIP_LZMA)
    refuse("a is not deflated")
    zipped(path, {str(i): b"" for i in range(4001)})
    refuse("holds 4001 files")
    path.write_bytes(bytes(2**22 + 1))
    refuse("has 4194305 bytes")
    zipped(path, {"a": bytes(10**6)})
    path.write_bytes(path.read_bytes()[:-40])
    refuse("cannot be read")


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


@pytest.mark.parametrize("flag", [8, 16])
def test_no_member_of_a_gzip_may_hide_behind_the_first(tmp_path, flag):
    whole = gzip.compress(b"content")
    (tmp_path / "x.gz").write_bytes(whole + whole[:3] + bytes([flag]) + whole[4:10] + b"x" * 2**24)
    with pytest.raises(UfomError, match="more follows its end"):
        sources.content_digest(tmp_path / "x.gz")
