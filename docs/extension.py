"""What the site adds to Sphinx: links between equations and code, both ways; figures without pyplot; the explorer; what
the programs of its pages print; formulas that KaTeX renders in the browser."""

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils.nodes import SkipNode

import ufom_runtime
import ufom_theory
from blocks import fill_in
from ufom_theory import derivations
from ufom_theory.derivations.registry import load

# "(21)", but not the (1) of O(1); "Algorithm 4", "Lemma 1"
MENTION = re.compile(
    r"(?<![\w)\]])\((\d{1,2})\)|\b(Algorithm|Theorem|Lemma|Proposition) (\d)\b"
)
QUOTED = re.compile(r"(`+[^`]*`+)")
properties: dict[str, list[str]] = {}
CLAIMS = load()


def _ids() -> dict[str, str]:
    """What a docstring may mention, a number or "Lemma 1" → the id of the first claim about it, errata left out."""
    found: dict[str, str] = {}
    for claim in CLAIMS.values():
        if not claim.id.startswith("erratum"):
            for first, last in re.findall(r"\((\d+)\)(?:–\((\d+)\))?", claim.equation):
                found = {
                    str(n): claim.id for n in range(int(first), int(last or first) + 1)
                } | found
            for name in re.findall(
                r"(?:Algorithm|Theorem|Lemma|Proposition) \d", claim.equation
            ):
                found.setdefault(name, claim.id)
    return found


IDS = _ids()


def mentioned(match: re.Match[str]) -> str | None:
    """The id of the claim that is mentioned."""
    number, kind, of_kind = match.groups()
    return IDS.get(number or f"{kind} {of_kind}")


def documented() -> Iterator[tuple[str, Any]]:
    """Everything that has a place on the site: the public face and the derivations."""
    for package in (ufom_theory, ufom_runtime):
        for name in package.__all__:
            if callable(
                value := getattr(package, name)
            ):  # FOM and the like speak through their class
                yield f"{package.__name__}.{name}", value
    for info in pkgutil.iter_modules(derivations.__path__, "ufom_theory.derivations."):
        if not info.name.endswith("__main__"):
            module = importlib.import_module(info.name)
            for name, value in vars(module).items():
                unwrapped = inspect.unwrap(value) if callable(value) else None
                if (
                    inspect.isfunction(unwrapped)
                    and unwrapped.__module__ == info.name
                    and name[0] != "_"
                ):
                    yield f"{info.name}.{name}", value


def link_equations(app: Any, docname: str, source: list[str]) -> None:
    """In the pages of the proofs: links from each claim to the code that mentions it."""
    if not docname.startswith("proofs/"):
        return
    code: dict[str, list[str]] = {}
    deciding = {claim.decide_form for claim in CLAIMS.values()}
    for name, value in documented():
        for match in MENTION.finditer(inspect.getdoc(value) or ""):
            id = mentioned(match)
            if id and value not in deciding and name not in code.setdefault(id, []):
                code[id].append(name)
    parts = re.split(r"^(?=\(equation-)", source[0], flags=re.M)
    for i, part in enumerate(parts):
        head = re.match(r"\(equation-([\w/-]+)\)=", part)
        if head and code.get(head[1]):
            names = ", ".join(f"{{py:obj}}`{name}`" for name in code[head[1]])
            parts[i] = f"{part.rstrip()}\n\nIn code: {names}.\n\n"
    source[0] = "".join(parts)


def escape(prose: str) -> str:
    """The signs of |x| and of (2, *shape) as themselves, not as reStructuredText's."""
    return prose.replace("|", r"\|").replace(", *", r", \*")


def link_docstrings(
    app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """In docstrings: "(21)" and "Algorithm 4" become links; a claim's function says which equation it decides."""

    def link(match: re.Match[str]) -> str:
        id = mentioned(match)
        return f":ref:`{match[0]} <equation-{id}>`" if id else match[0]

    for i, line in enumerate(lines):
        line = re.sub(r"^( *)UfomError:", r"\1ufom_theory.UfomError:", line)
        lines[i] = "".join(
            p if p.startswith("`") else MENTION.sub(link, escape(p))
            for p in QUOTED.split(line)
        )
    for claim in CLAIMS.values():
        if claim.decide_form is obj:
            lines += [
                "",
                f"Decides :ref:`{claim.id}, {claim.equation} <equation-{claim.id}>`: {claim.status}.",
                "",
            ]
    properties[name] = list(lines)


def keep_properties(
    app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Napoleon takes what stands before a property's first colon for a type; here it is the formula's left side."""
    if what in ("property", "attribute", "data"):
        lines[:] = properties[name]


def figures(
    block: Any, block_vars: dict[str, Any], gallery_conf: dict[str, Any]
) -> str:
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


def show_output(app: Any, docname: str, source: list[str]) -> None:
    """In the pages: what a program printed in this build, where the text has "..."; a quick build leaves it."""
    if app.config.plot_gallery not in (0, "0", False, "False") and "/" not in docname:
        source[0] = fill_in(source[0])


def inline_formula(self: Any, node: Any) -> None:
    """TeX as it stands; `site.js` has it rendered."""
    self.body.append(
        f"{self.starttag(node, 'span', '', CLASS='math')}{self.encode(node.astext())}</span>"
    )
    raise SkipNode


def formula(self: Any, node: Any) -> None:
    """The same on a separate line."""
    self.body.append(
        f"{self.starttag(node, 'div', CLASS='math')}{self.encode(node.astext())}</div>\n"
    )
    raise SkipNode


def setup(app: Any) -> dict[str, bool]:
    """Sphinx's entry point."""
    app.add_html_math_renderer("katex", (inline_formula, None), (formula, None))
    app.connect("builder-inited", write_explorer)
    app.connect("source-read", show_output)
    app.connect("source-read", link_equations)
    app.connect(
        "autodoc-process-docstring", link_docstrings, priority=400
    )  # before napoleon
    app.connect("autodoc-process-docstring", keep_properties, priority=600)  # after it
    return {"parallel_read_safe": True}
