"""Where the compiler keeps what it compiled: a folder that nobody else can write to, since torch unpickles it."""

from __future__ import annotations

import os
import stat
import tempfile
import warnings
from functools import cache
from pathlib import Path

_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def keep_privately() -> None:
    """Let inductor keep its files in `ufom/inductor` in the user's cache folder, unless the user named another.

    torch's own default is in the shared temporary folder, under a name that anybody can guess and make first; it keeps
    its precompiled header there whatever the variable says.
    """
    import torch._inductor.codecache as codecache
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    named = os.environ.get(_VARIABLE)
    if named in (None, default_cache_dir()):  # torch sets the variable to its default
        named = os.environ[_VARIABLE] = str(_folder())
    if hasattr(codecache, "_HEADER_DIR"):
        codecache._HEADER_DIR = os.path.join(named, "precompiled_headers")
        codecache._HEADER_LOCK_DIR = os.path.join(codecache._HEADER_DIR, "locks")


@cache
def _folder() -> Path:
    """A folder of mode 0700 that is the user's own; where there can be none, a new one that is not found again."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ufom" / "inductor"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if refused := why_not(folder):
            raise OSError(refused)
    except (OSError, RuntimeError) as error:
        warnings.warn(
            f"what is compiled is not kept for the next process: {error}; name a folder of your own, {_VARIABLE}=",
            stacklevel=2,
        )
        return Path(tempfile.mkdtemp(prefix="ufom-inductor-"))
    return folder


def why_not(folder: Path) -> str:
    """Why files in the folder may be another user's; empty where they cannot be. A folder of ours is set to 0700."""
    found = os.lstat(folder)
    if not stat.S_ISDIR(found.st_mode):
        return f"{folder} is not a folder"
    if hasattr(os, "getuid") and found.st_uid != os.getuid():
        return f"{folder} is another user's"
    if found.st_mode & 0o022:
        return f"others may write to {folder}: remove it, or chmod 700 it after a look at what is in it"
    if found.st_mode & 0o077:
        os.chmod(folder, 0o700)
    return ""
