"""CIFAR-100's reader on small archives made here, whole and damaged, and the few-shot problem on one."""

import gzip
import io
import tarfile

import numpy as np
import pytest
import torch

from ufom_runtime import UFOM, hypergradient
from ufom_runtime.problems import data
from ufom_runtime.problems.few_shot import cifar100_few_shot
from ufom_theory import UfomError

PER_CLASS = {"train.bin": 3, "test.bin": 1}


def records(n, seed):
    """n records a class, shuffled: coarse label, fine label, pixels."""
    rng = np.random.default_rng(seed)
    fine = rng.permutation(np.repeat(np.arange(100, dtype=np.uint8), n))
    return np.column_stack([fine // 5, fine, rng.integers(0, 256, (len(fine), 3072), dtype=np.uint8)]).astype(np.uint8)


def archive(members):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz", compresslevel=1) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if content not in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE):
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            else:
                info.type, info.linkname = content, "/etc/passwd"
                tar.addfile(info)
    return out.getvalue()


TRAIN, TEST = (records(n, seed) for seed, n in enumerate(PER_CLASS.values()))
WHOLE = [
    ("cifar-100-binary", tarfile.DIRTYPE),
    ("cifar-100-binary/fine_label_names.txt", b"apple\n"),
    ("cifar-100-binary/test.bin", TEST.tobytes()),
    ("cifar-100-binary/train.bin", TRAIN.tobytes()),
]


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setenv("UFOM_DATA", str(tmp_path))
    monkeypatch.setattr(data, "CIFAR100_TRAIN", PER_CLASS["train.bin"])
    monkeypatch.setattr(data, "CIFAR100_TEST", PER_CLASS["test.bin"])
    (tmp_path / "cifar100").mkdir()
    data.cifar100.cache_clear()
    yield tmp_path / "cifar100" / "cifar-100-binary.tar.gz"
    data.cifar100.cache_clear()


def test_every_image_is_where_its_label_says(path):
    path.write_bytes(archive(WHOLE))
    (images, labels), (test_images, test_labels) = data.read_cifar100(path)
    np.testing.assert_array_equal(labels, TRAIN[:, 1])
    np.testing.assert_array_equal(images[7, 1, 2, 3], TRAIN[7, 2 + 1024 + 2 * 32 + 3])  # green, row 2, column 3
    assert (test_images.shape, test_labels.shape) == ((100, 3, 32, 32), (100,))
    pooled = data.cifar100()
    assert (pooled.shape, pooled.dtype) == ((100, 4, 3, 32, 32), torch.uint8)
    order = np.random.default_rng(0).permutation(100)
    for place in (0, 50, 99):
        fine = order[place]
        expected = np.concatenate([TRAIN[TRAIN[:, 1] == fine], TEST[TEST[:, 1] == fine]])[:, 2:]
        np.testing.assert_array_equal(pooled[place].flatten(1).numpy(), expected)
    assert list(path.parent.iterdir()) == [path]  # nothing was extracted


def altered(**parts):
    return archive([(name, parts.get(name.split("/")[-1].split(".")[0], content)) for name, content in WHOLE])


LABELS = TRAIN.copy()
LABELS[0, 1] = 200
UNEVEN = TRAIN.copy()
UNEVEN[0, 1] = (UNEVEN[0, 1] + 1) % 100


def claiming(size):
    """An archive whose one header claims `size` bytes of train.bin."""
    info = tarfile.TarInfo("cifar-100-binary/train.bin")
    info.size = size
    return gzip.compress(info.tobuf() + b"\0" * 10240)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no gzip", "cannot be read"),
        (archive(WHOLE)[:-40_000], "cannot be read|cut short"),
        (gzip.compress(b"no tar" * 1000), "cannot be read"),
        (archive(WHOLE[:-1]), "lacks train.bin"),
        (archive([]), "lacks test.bin"),
        (altered(train=TRAIN.tobytes()[:-1]), "claims 922199 bytes, not 300 records of 3074"),
        (altered(train=LABELS.tobytes()), "are not 3 of each class"),
        (altered(train=UNEVEN.tobytes()), "are not 3 of each class"),
        (claiming(2**33 - 1), "claims 8589934591 bytes"),
        (claiming(2**40), "no plain file"),  # a size that only an extended header can say
        (archive([*WHOLE, WHOLE[-1]]), "train.bin twice"),
        (claiming(300 * 3074), "cannot be read|cut short"),
        (archive([("../cifar-100-binary/train.bin", b"x")]), "not of CIFAR-100"),
        (archive([("/cifar-100-binary/train.bin", b"x")]), "not of CIFAR-100"),
        (archive([("cifar-100-binary/../train.bin", b"x")]), "not of CIFAR-100"),
        (archive([("cifar-100-binary/train.bin", tarfile.SYMTYPE)]), "not of CIFAR-100"),
        (archive([("cifar-100-binary/train.bin", tarfile.LNKTYPE)]), "not of CIFAR-100"),
    ],
)
def test_damaged_archives_are_named(path, content, message):
    path.write_bytes(content)
    with pytest.raises(UfomError, match=message) as caught:
        data.read_cifar100(path)
    assert path.name in str(caught.value)


def test_what_decodes_to_too_much_is_refused(path, monkeypatch):
    monkeypatch.setattr(data, "MOST_BYTES", 10**6)
    path.write_bytes(archive([("cifar-100-binary/names.txt", bytes(2 * 10**6)), *WHOLE]))
    with pytest.raises(UfomError, match="decodes to more than 1000000 bytes"):
        data.read_cifar100(path)


def test_tasks_are_floats_of_different_classes_and_test_tasks_of_those_held_out(path):
    path.write_bytes(archive(WHOLE))
    problem = cifar100_few_shot(ways=5, shots=2, filters=3, r=2)
    assert (len(problem.images), len(problem.test_images)) == (80, 20)
    train, labels, test, test_labels = problem.sample(2, torch.Generator().manual_seed(0))
    assert (train.shape, test.shape) == ((2, 10, 3, 32, 32), (2, 5, 3, 32, 32))
    assert (train.dtype, float(train.max()), float(train.min())) == (torch.float32, 1.0, 0.0)
    assert (labels.shape, test_labels.shape) == ((2, 10), (2, 5))
    held_out = {tuple(x.tolist()) for x in problem.test_images.flatten(0, 1).flatten(1)[:, :9]}
    shown = (
        problem.sample_test_tasks(2, torch.Generator().manual_seed(0))[2].flatten(0, 1).flatten(1)[:, :9] * 255
    ).round()
    assert all(tuple(x.int().tolist()) in held_out for x in shown)
    tasks = problem.sample(1, torch.Generator().manual_seed(1))
    assert torch.isfinite(hypergradient(problem, problem.initial, tasks, UFOM(1.0))).all()
    assert cifar100_few_shot(ways=30, filters=3, held_out=30, dtype=torch.float64).initial.dtype == torch.float64
    with pytest.raises(UfomError, match=r"ways = 30: give 2 to 20"):
        cifar100_few_shot(ways=30)
    with pytest.raises(UfomError, match=r"held_out = 99: give 2 to 98"):
        cifar100_few_shot(held_out=99)
