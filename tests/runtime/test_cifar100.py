"""CIFAR-100's reader on a small archive made here, and the few-shot problem on it."""

import hashlib
import io
import tarfile

import numpy as np
import pytest
import torch

from ufom_runtime import UFOM, hypergradient
from ufom_runtime.problems import data
from ufom_runtime.problems.few_shot import cifar100_few_shot
from ufom_runtime.problems.sources import SOURCES, Source
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
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


TRAIN, TEST = (records(n, seed) for seed, n in enumerate(PER_CLASS.values()))
WHOLE = {
    "cifar-100-binary/fine_label_names.txt": b"apple\n",
    "cifar-100-binary/test.bin": TEST.tobytes(),
    "cifar-100-binary/train.bin": TRAIN.tobytes(),
}


@pytest.fixture
def path(tmp_path, monkeypatch):
    content = archive(WHOLE)
    pin = "md5:" + hashlib.md5(content).hexdigest()
    monkeypatch.setenv("UFOM_DATA", str(tmp_path))
    monkeypatch.setitem(SOURCES, "cifar100", Source((), {"cifar-100-binary.tar.gz": pin}))
    (tmp_path / "cifar100").mkdir()
    found = tmp_path / "cifar100" / "cifar-100-binary.tar.gz"
    found.write_bytes(content)
    data.cifar100.cache_clear()
    yield found
    data.cifar100.cache_clear()


def test_every_image_is_where_its_label_says(path):
    pooled = data.cifar100()
    assert (pooled.shape, pooled.dtype) == ((100, 4, 3, 32, 32), torch.uint8)
    order = np.random.default_rng(0).permutation(100)
    for place in (0, 50, 99):
        fine = order[place]
        expected = np.concatenate([TRAIN[TRAIN[:, 1] == fine], TEST[TEST[:, 1] == fine]])[:, 2:]
        np.testing.assert_array_equal(pooled[place].flatten(1).numpy(), expected)
    assert list(path.parent.iterdir()) == [path]  # nothing was extracted


def test_tasks_are_floats_of_different_classes_and_test_tasks_of_those_held_out(path):
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
