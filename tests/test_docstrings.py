"""Every public name says what it is and what it raises; what it says of a parameter, it has."""

import dataclasses
import doctest
import importlib
import inspect
import re
from pathlib import Path

import pytest

import ufom_runtime
import ufom_theory

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted(
    path
    for package in ("ufom_theory", "ufom_runtime")
    for path in (ROOT / package).rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)
PUBLIC = [(module, name) for module in (ufom_theory, ufom_runtime) for name in module.__all__]
RAISES = re.compile(r"\braise (ufom_theory\.)?UfomError")
REFUSES = re.compile(RAISES.pattern + r"|\b(finite|positive|integer|scalar|instance|check|cpu_generator)\(")


def parameters(function):
    return [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]


def sections(docstring):
    """The summary, and the text of each Google section by its name."""
    parts = re.split(r"^(Args|Attributes|Returns|Yields|Raises):$", docstring, flags=re.M)
    return parts[0].strip().split("\n\n")[0], dict(zip(parts[1::2], parts[2::2], strict=True))


def faults(name, documented, function, base=""):
    """What is missing from one docstring or wrong in it; `function` gives the parameters and the source.

    A method that overrides another may leave to that one's docstring, `base`, what both have.
    """
    docstring = inspect.cleandoc(getattr(documented, "__doc__", "") or "") + base
    summary, found = sections(docstring)
    if not re.search(r"\w", summary):
        yield f"{name} has no summary"
    named = re.findall(r"^    (\w[\w, ]*):", found.get("Args", ""), re.M)
    named = [one for line in named for one in line.split(", ")]
    yield from (f"{name} has no parameter {one}" for one in named if one not in parameters(function))
    source = inspect.getsource(inspect.unwrap(function))
    said = "Raises" in found or re.search(r"\brefused\b|UfomError|[Ee]rrors\b", docstring)
    if (RAISES if "." in name else REFUSES).search(source) and not said:
        yield f"{name} does not say what it raises"


def of_class(name, cls):
    builder = vars(cls).get("__post_init__") or (None if dataclasses.is_dataclass(cls) else vars(cls).get("__init__"))
    docstring = inspect.cleandoc(cls.__doc__ or "")
    _, found = sections(docstring)
    named = re.findall(r"^    (\w+):", found.get("Attributes", ""), re.M)
    fields = [f.name for f in dataclasses.fields(cls)] + parameters(cls) if dataclasses.is_dataclass(cls) else []
    yield from (f"{name} has no field {one}" for one in named if fields and one not in fields)
    if builder and REFUSES.search(inspect.getsource(builder)) and "Raises" not in found:
        yield f"{name} does not say what it raises"
    if not docstring:
        yield f"{name} has no docstring"
    for key, member in vars(cls).items():
        if key.startswith("_"):
            continue
        if isinstance(member, property):
            member = member.fget
        member = getattr(member, "__func__", getattr(member, "func", member))  # class methods, cached properties
        if inspect.isfunction(member):
            bases = [inspect.getdoc(vars(base)[key]) or "" for base in cls.__mro__[1:] if key in vars(base)]
            yield from faults(f"{name}.{key}", member, member, "\n".join(["", *bases]))


@pytest.mark.parametrize(("module", "name"), PUBLIC, ids=[name for _, name in PUBLIC])
def test_it_is_documented(module, name):
    documented = getattr(module, name)
    if inspect.isclass(documented):
        assert list(of_class(name, documented)) == []
    elif inspect.isfunction(documented):
        assert list(faults(name, documented, documented)) == []
    else:  # an instance: its class is documented, or Python's own, and it itself where it is made
        own = type(documented).__module__ != "builtins"
        assert not own or list(of_class(name, type(documented))) == []
        source = inspect.getsource(inspect.getmodule(type(documented)) if own else ufom_runtime.methods)
        assert re.search(rf'^{name}\b[^=\n]* = (.*|{{\n(.*\n)*?}})\n"""\w', source, re.M)


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda path: path.stem)
def test_examples_do_what_they_say(file):
    module = importlib.import_module(".".join(file.relative_to(ROOT).with_suffix("").parts))
    found = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert found.attempted > 0
    assert not found.failed


def test_every_public_name_has_a_place_on_the_site():
    page = (Path(__file__).parents[1] / "docs" / "api.md").read_text(encoding="utf-8")
    placed = set(re.findall(r"^\.\. auto\w+:: (ufom_theory|ufom_runtime)\.(?:[a-z]\w*\.)*(\w+)$", page, re.M))
    assert {(module.__name__, name) for module, name in PUBLIC} <= placed


def test_a_missing_part_is_found():
    def refuses(x, y):
        """What it does.

        Args:
            z: a number.
        """
        raise ufom_theory.UfomError(x, y)

    found = list(faults("refuses", refuses, refuses))
    assert found == ["refuses has no parameter z", "refuses does not say what it raises"]
