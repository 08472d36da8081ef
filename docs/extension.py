"""What the site adds to Sphinx: links between equations and code, both ways; figures without pyplot; the explorer."""

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ufom_runtime
import ufom_theory
from ufom_theory import claims, derivations
from ufom_theory.claims import CLAIMS

# "(21)", but not the (1) of O(1); "Algorithm 4", "Lemma 1"
MENTION = re.compile(r"(?<![\w)\]])\((\d{1,2})\)|\b(Algorithm|Theorem|Lemma|Proposition) (\d)\b")
QUOTED = re.compile(r"(`+[^`]*`+)")
properties: dict[str, list[str]] = {}


def _ids() -> dict[str, str]:
    """What a docstring may mention → the claim's id; "2" → "2-3"."""
    found = {}
    for id in CLAIMS:
        first, _, last = id.partition("-")
        if first.isdigit():
            found |= {str(n): id for n in range(int(first), int(last or first) + 1)}
    return found


IDS = _ids()


def mentioned(match: re.Match[str]) -> str | None:
    """The id of the claim that is mentioned."""
    number, kind, of_kind = match.groups()
    id = IDS.get(number) if number else f"{kind.lower()}-{of_kind}"
    return id if id in CLAIMS else None


def documented() -> Iterator[tuple[str, Any]]:
    """Everything that has a place on the site: the public face, the derivations, the claims."""
    for package in (ufom_theory, ufom_runtime):
        for name in package.__all__:
            if callable(value := getattr(package, name)):  # FOM and the like speak through their class
                yield f"{package.__name__}.{name}", value
    for package in (derivations, claims):
        for info in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            if not info.name.endswith("__main__"):
                module = importlib.import_module(info.name)
                for name, value in vars(module).items():
                    unwrapped = inspect.unwrap(value) if callable(value) else None
                    if inspect.isfunction(unwrapped) and unwrapped.__module__ == info.name and name[0] != "_":
                        yield f"{info.name}.{name}", value


def link_equations(app: Any, docname: str, source: list[str]) -> None:
    """In equations.md: an anchor for every claim, links to what decides it and to the code that mentions it."""
    if docname != "equations":
        return
    code: dict[str, list[str]] = {}
    for name, value in documented():
        for match in MENTION.finditer(inspect.getdoc(value) or ""):
            id = mentioned(match)
            if id and name not in code.setdefault(id, []) and not name.startswith("ufom_theory.claims."):
                code[id].append(name)
    text = re.sub(r"`(ufom_theory\.claims\.[\w.]+)`", r"{py:obj}`\1`", source[0])
    parts = re.split(r"^(?=### )", text, flags=re.M)
    for i, part in enumerate(parts):
        if head := re.match(r"### ([\w-]+):", part):
            names = ", ".join(f"{{py:obj}}`{name}`" for name in code.get(head[1], []))
            section, _, rest = part.rstrip().partition("\n## ")
            said = f"\n\nIn code: {names}.\n\n" if names else "\n\n"
            parts[i] = f"(equation-{head[1]})=\n{section}{said}" + (f"## {rest}\n\n" if rest else "")
    source[0] = "".join(parts)


def escape(prose: str) -> str:
    """The signs of |x| and of (2, *shape) as themselves, not as reStructuredText's."""
    return prose.replace("|", r"\|").replace(", *", r", \*")


def link_docstrings(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """In docstrings: "(21)" and "Algorithm 4" become links; a claim's function says which equation it decides."""

    def link(match: re.Match[str]) -> str:
        id = mentioned(match)
        return f":ref:`{match[0]} <equation-{id}>`" if id else match[0]

    for i, line in enumerate(lines):
        line = re.sub(r"^( *)UfomError:", r"\1ufom_theory.UfomError:", line)
        lines[i] = "".join(p if p.startswith("`") else MENTION.sub(link, escape(p)) for p in QUOTED.split(line))
    for claim in CLAIMS.values():
        if claim.evidence is obj:
            lines += ["", f"Decides :ref:`{claim.id}, {claim.equation} <equation-{claim.id}>`: {claim.status}.", ""]
    properties[name] = list(lines)


def keep_properties(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Napoleon takes what stands before a property's first colon for a type; here it is the formula's left side."""
    if what in ("property", "attribute", "data"):
        lines[:] = properties[name]


def figures(block: Any, block_vars: dict[str, Any], gallery_conf: dict[str, Any]) -> str:
    """The `figure` that a block of an example leaves: this package draws without pyplot."""
    from sphinx_gallery.scrapers import figure_rst

    figure = block_vars["example_globals"].pop("figure", None)
    if figure is None:
        return ""
    path = next(block_vars["image_path_iterator"])
    figure.savefig(path, dpi=110)
    return str(figure_rst([path], gallery_conf["src_dir"]))


def write_explorer(app: Any) -> None:
    """The page of `ufom explore`, beside the site's own."""
    from ufom_runtime.command.explorer import explorer_page

    folder = Path(app.confdir) / "_build" / "extra"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "explorer.html").write_text(explorer_page(), encoding="utf-8")


def setup(app: Any) -> dict[str, bool]:
    """Sphinx's entry point."""
    app.connect("builder-inited", write_explorer)
    app.connect("source-read", link_equations)
    app.connect("autodoc-process-docstring", link_docstrings, priority=400)  # before napoleon
    app.connect("autodoc-process-docstring", keep_properties, priority=600)  # after it
    return {"parallel_read_safe": True}
