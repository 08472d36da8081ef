"""Where compiled steps are kept: privately, and found again by another process."""

import os
import subprocess
import sys

import pytest

from ufom_runtime.compiled import cache

TWICE = """
import torch
from torch._dynamo.utils import counters
from ufom_runtime.compiled.trace import build, trace

argument = (torch.ones(3, dtype=torch.float64),)
for value in (2.0, 3.0):
    known = torch.full((3,), value, dtype=torch.float64)
    (step,) = build((trace(lambda x: (known * x,), argument), argument, None))
    print(step(*argument)[0].tolist(), counters["inductor"]["fxgraph_cache_hit"])
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache._folder.cache_clear()
    yield tmp_path / "ufom" / "inductor"
    cache._folder.cache_clear()


def test_the_folder_is_made_for_its_user_alone(home):
    assert cache._folder() == home
    assert home.stat().st_mode & 0o777 == 0o700


def test_a_folder_that_others_can_read_is_closed(home):
    home.mkdir(parents=True)
    home.chmod(0o755)
    assert cache._folder() == home
    assert home.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    ("plant", "why"),
    [
        (lambda folder: (folder.mkdir(parents=True), folder.chmod(0o777)), "others may write to"),
        (lambda folder: (folder.parent.mkdir(), folder.symlink_to(os.sep)), "is not a folder"),
        (lambda folder: (folder.parent.mkdir(), folder.write_text("")), "File exists"),
    ],
    ids=["open to others", "link", "file"],
)
def test_a_folder_that_may_hold_what_others_wrote_is_not_used(home, plant, why):
    plant(home)
    with pytest.warns(UserWarning, match=rf"not kept for the next process: .*{why}"):
        other = cache._folder()
    assert other != home
    assert other.stat().st_mode & 0o777 == 0o700
    assert not list(other.iterdir())
    other.rmdir()


def test_another_users_folder_is_not_used(home, monkeypatch):
    home.mkdir(parents=True)
    monkeypatch.setattr(os, "getuid", lambda: home.stat().st_uid + 1, raising=False)
    assert "another user's" in cache.why_not(home)


@pytest.mark.slow
def test_a_later_process_finds_what_was_compiled_and_takes_its_own_constants(tmp_path):
    """Slow: the compiler reads torch's headers."""
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    env.pop("TORCHINDUCTOR_CACHE_DIR", None)  # this process may have compiled, and named its own folder
    said = [
        subprocess.run([sys.executable, "-c", TWICE], env=env, check=True, capture_output=True, text=True).stdout
        for _ in range(2)
    ]
    assert said == [f"[2.0, 2.0, 2.0] {i}\n[3.0, 3.0, 3.0] {2 * i}\n" for i in (0, 1)]
    assert (tmp_path / "ufom" / "inductor" / "fxgraph").is_dir()
