"""The state of an outer run on disk: tensors as safetensors, all else as JSON. Nothing is pickled."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ufom_runtime.files import MissingFile, digest, make_folder, read_sealed, read_whole, write_sealed, write_whole
from ufom_runtime.problem import BilevelProblem, Task, Tasks
from ufom_theory import UfomError
from ufom_theory.checks import positive

_TENSORS = re.compile(r"tensors-[0-9a-f]{16}\.safetensors")  # no path: nothing outside of the folder is read


@dataclass(frozen=True)
class Checkpoint:
    """A folder with one state. `state.json` names the tensor file of its step: it is written last, and decides.

    The folder is one run's at a time: two would delete each other's tensors, and leave a state that is damaged.

    Attributes:
        folder: where the state is; made if missing.
        config: what the run was asked for, as JSON; a state of another one is refused.
        most_bytes: of the tensors; what holds more is neither written nor read.

    Raises:
        UfomError: a folder that cannot be made.
        ModuleNotFoundError: safetensors is not installed.
    """

    folder: Path
    config: dict[str, Any]
    most_bytes: int

    def __post_init__(self) -> None:
        _safetensors()
        make_folder(self.folder)

    def save(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Store a state; the one before it is removed once this one is whole, and what a killed run left of one.

        Raises:
            UfomError: more than `most_bytes` of tensors, values that are not JSON, or a file that cannot be written.
        """
        content: bytes = _safetensors().save({name: t.detach().cpu().contiguous() for name, t in tensors.items()})
        if len(content) > self.most_bytes:
            raise UfomError(f"a state of {len(content)} bytes, more than {self.most_bytes}: run without checkpoint=")
        name = f"tensors-{digest(content)[:16]}.safetensors"
        write_whole(self.folder / name, content)
        record = {"config": self.config, "tensors": name, "tensors_sha256": digest(content), **values}
        write_sealed(self.folder / "state.json", record)
        with suppress(OSError):  # the next state removes what stays
            for old in (*self.folder.glob("tensors-*.safetensors"), *self.folder.glob(".*.tmp")):
                if old.name != name:
                    old.unlink(missing_ok=True)

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The stored tensors, on the CPU, and values; None where nothing is stored.

        Raises:
            UfomError: a file that is damaged or cannot be read, or a state of another configuration.
        """
        path = self.folder / "state.json"
        try:
            values = read_sealed(path)
        except MissingFile:
            return None
        stored, name = values.get("config"), str(values.get("tensors"))
        if not isinstance(stored, dict) or not _TENSORS.fullmatch(name):
            raise UfomError(
                f"{path} is damaged: it is no state, or names {name!r} as its tensors; remove {self.folder}"
            )
        for key in {**self.config, **stored}:
            if stored.get(key) != self.config.get(key):
                raise UfomError(
                    f"{path} is of another run: its {key} is {stored.get(key)}, not {self.config.get(key)}; give "
                    "checkpoint= a folder of its own, or remove this one"
                )
        file = self.folder / name
        try:
            content = read_whole(file, self.most_bytes)
        except MissingFile:
            content = b""
        if digest(content) != values.get("tensors_sha256"):
            raise UfomError(f"{file} is damaged: its content is not what {path.name} says; remove {self.folder}")
        try:
            return _safetensors().load(content), values
        except Exception as error:  # the library's own class is no public name
            raise UfomError(f"{file} is damaged: {error}; remove {self.folder}") from error


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "checkpoint= needs safetensors: pip install 'ufom[runtime]'", name=error.name
        ) from error
    return safetensors.torch


def describe(
    problem: BilevelProblem, theta: Tensor, tasks: Task, outer: Callable[[int], float] | Optimizer, steps: int
) -> dict[str, Any]:
    """What tells one run from another, as JSON: θ_0, the inner steps, the first tasks drawn, and the outer steps.

    Outer step sizes are compared at 64 steps at most, spread over the run; an optimiser by its class and settings.
    """
    if isinstance(outer, Optimizer):
        groups = [{k: v for k, v in group.items() if k != "params"} for group in outer.param_groups]
        taken = f"{type(outer).__name__} {digest(repr(groups))[:16]}"
    else:
        spread = sorted({1 + i * (steps - 1) // 63 for i in range(64)})
        taken = digest(repr([float(positive("γ_k", outer(k))) for k in spread]))[:16]
    return {
        "problem": type(problem).__name__,
        "r": problem.r,
        "inner step sizes": _fingerprint(torch.as_tensor(problem.step_sizes)),
        "θ_0": _fingerprint(theta),
        "first tasks": _fingerprint(*Tasks.of(tasks).parts),
        "outer steps": f"{steps}, {taken}",
    }


def _fingerprint(*tensors: Tensor) -> str:
    kinds = ", ".join(f"{t.dtype} {tuple(t.shape)}".removeprefix("torch.") for t in tensors)
    content = b"".join(t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes() for t in tensors)
    return f"{kinds} {digest(content)[:16]}"


def pack(value: Any, tensors: dict[str, Tensor], name: str) -> Any:
    """A nested state, such as an optimiser's `state_dict()`, as JSON; its tensors are put into `tensors`."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):  # as pairs: JSON has no integer keys
        return {"dict": [[key, pack(v, tensors, f"{name}.{key}")] for key, v in value.items()]}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [pack(v, tensors, f"{name}.{i}") for i, v in enumerate(value)]}
    return value


def unpack(packed: Any, tensors: dict[str, Tensor]) -> Any:
    """What `pack` was given."""
    if not isinstance(packed, dict):
        return packed
    ((kind, content),) = packed.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: unpack(v, tensors) for key, v in content}
    return {"list": list, "tuple": tuple}[kind](unpack(v, tensors) for v in content)


def same_form(name: str, found: Any, expected: Any) -> None:
    """Raises a ValueError that names the first part of a nested state whose type, shape or dtype differs."""
    is_, must_be = _forms(name, found), _forms(name, expected)
    for part in must_be | is_:
        if is_.get(part) != must_be.get(part):
            raise ValueError(f"{part} is {is_.get(part, 'absent')}, not {must_be.get(part, 'absent')}")


def _forms(name: str, value: Any) -> dict[str, str]:
    """The type of each part, by name; of a tensor dtype and shape."""
    if isinstance(value, Tensor):
        return {name: f"{value.dtype} {tuple(value.shape)}"}
    found = {name: type(value).__name__}
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, part in inside:
        found |= _forms(f"{name}[{key!r}]", part)
    return found
