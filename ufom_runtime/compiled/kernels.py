"""The C++ kernels of several graphs, built as two files at the same time.

Inductor builds a file for each kernel. But the compiler takes 5 s to read torch's headers, or 13 s to precompile them,
and less than a second for a kernel. The first graph's kernels are begun while the others are lowered.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any


@dataclass(frozen=True)
class _Kernel:
    """A kernel that is not built yet: the C++ types of its arguments, and its code."""

    types: list[str]
    code: str

    def __call__(self, *arguments: object) -> None:
        raise RuntimeError("a kernel was called before it was built")


@contextmanager
def built_together() -> Iterator[None]:
    """Inside the block inductor's C++ kernels are begun; they are ready where it ends, and not to be called before."""
    from torch._inductor import async_compile, config

    options: dict[str, Any] = {"cpp_cache_precompile_headers": False}
    if config.cpp.vec_isa_ok is None:  # else a program is built, and run in each process, to try the vector units
        options["cpp.vec_isa_ok"] = True
    made: Any = async_compile.AsyncCompile
    begun: list[Callable[[], None]] = []
    others: list[tuple[dict[str, Any], str]] = []
    binding, wait = made.cpp_pybinding, made.wait

    def begin(self: Any, scope: dict[str, Any]) -> None:
        wait(self, scope)  # for what is not ours
        places = [(scope, name) for name, value in scope.items() if isinstance(value, _Kernel)]
        if begun:
            others.extend(places)
        elif places:
            begun.append(_begin(places, made.submit))

    with config.patch(options):
        made.cpp_pybinding, made.wait = lambda self, types, code: _Kernel(types, code), begin
        try:
            yield
        finally:
            made.cpp_pybinding, made.wait = binding, wait
        if others:
            begun.append(_begin(others, made.submit))
        for finish in begun:
            finish()


def _begin(places: list[tuple[dict[str, Any], str]], submit: Any) -> Callable[[], None]:
    """Begin to build the kernels in these places; what is returned waits for them, and puts them there."""
    from torch._inductor.codecache import CppPythonBindingsCodeCache as Bindings

    class OneFile(Bindings):
        @staticmethod
        def _load_library_inner(path: str, key: str) -> Any:
            return SimpleNamespace(path=path)

        @classmethod
        def _get_uncompiled_header(cls, device: str) -> None:
            return None

    OneFile.cache = {}  # not shared with the kernels that are separate files
    load = OneFile.load_async(_one_file([scope[name] for scope, name in places], Bindings), submit_fn=submit)

    def finish() -> None:
        library = load()
        for i, (scope, name) in enumerate(places):  # a module of the library for each
            one: Any = type("One", (Bindings,), {"entry_function": f"kernel{i}"})
            scope[name] = getattr(one._load_library_inner(library.path, library.key), f"kernel{i}")

    return finish


def _one_file(kernels: list[_Kernel], bindings: Any) -> str:
    """Each kernel and its Python bindings in a namespace, after the headers of all."""
    headers: dict[str, None] = {}
    parts = []
    for i, kernel in enumerate(kernels):
        given = ", ".join(f"parse_arg<{t.replace('const ', '')}>(args, {n})" for n, t in enumerate(kernel.types))
        code = kernel.code + bindings.suffix_template.format(
            entry_func=f"kernel{i}",
            arg_len=len(kernel.types),
            call_entry_func=bindings.call_entry_function.format(given),
            extra_parse_arg="",
        )
        headers.update(dict.fromkeys(re.findall(r"^ *#include.*$", code, re.MULTILINE)))
        code = re.sub(r"^ *#(include|define PY_SSIZE_T_CLEAN).*$", "", code, flags=re.MULTILINE)
        parts.append(f"#define kernel code{i}\nnamespace kernel_{i} {{\n{code}\n}}\n#undef kernel")
    return "\n".join(["#define PY_SSIZE_T_CLEAN", *headers, *parts])
