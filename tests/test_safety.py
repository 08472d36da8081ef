"""No file can run code: nothing here calls what would, under any name; and the check finds planted calls."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib", "yaml", "jsonpickle"}
FORBIDDEN = {  # by the full name
    "torch.load", "torch.jit.load", "torch.hub.load", "torch.package.PackageImporter", "numpy.load",
    "eval", "exec", "compile", "__import__", "builtins.eval", "builtins.exec", "builtins.compile", "runpy.run_path",
}  # fmt: skip
METHODS = {  # by the last name; torch's object collectives pickle
    "sympify", "parse_expr", "read_pickle", "allow_pickle", "Unpickler", "all_gather_object", "gather_object",
    "broadcast_object_list", "scatter_object_list", "send_object_list", "recv_object_list",
}  # fmt: skip


def dangers(source):
    """Lines and names of forbidden calls, mentions and imports, aliases resolved."""
    tree, names, found = ast.parse(source), {}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
                if alias.name.partition(".")[0] in MODULES:
                    found.append((node.lineno, alias.name))
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                whole = f"{node.module}.{alias.name}"
                if node.module.partition(".")[0] in MODULES or whole in FORBIDDEN or alias.name in METHODS:
                    found.append((node.lineno, whole))

    def full(node):
        if isinstance(node, ast.Name):
            return names.get(node.id, node.id)
        if isinstance(node, ast.Attribute):
            return f"{full(node.value)}.{node.attr}"
        return "?"

    def refuses_pickles(call):
        return any(k.arg == "allow_pickle" and getattr(k.value, "value", None) is False for k in call.keywords)

    def visit(node, ours):
        """`ours`: the parameters in scope; one named `compile` is not the builtin."""
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            ours = ours | {a.arg for a in ast.walk(node.args) if isinstance(a, ast.arg)}
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load):
            name = full(node)
            if (name in FORBIDDEN and name not in ours) or (isinstance(node, ast.Attribute) and node.attr in METHODS):
                found.append((node.lineno, name))
        elif isinstance(node, ast.Call) and full(node.func) == "numpy.load" and refuses_pickles(node):
            return
        elif isinstance(node, ast.Call):
            name, words = full(node.func), [a.value for a in node.args if isinstance(a, ast.Constant)]
            if name.endswith(("import_module", "getattr")):
                found.extend((node.lineno, w) for w in words if w in MODULES | METHODS | {"eval", "exec"})
            found.extend((node.lineno, k.arg) for k in node.keywords if k.arg in METHODS)
            found.extend([(node.lineno, name)] * (name == "sympy.S"))  # as an object, S holds constants
        for child in ast.iter_child_nodes(node):
            visit(child, ours)

    visit(tree, frozenset())
    return sorted(set(found))


PYTHON = [p for folder in ("ufom_theory", "ufom_runtime", "studies") for p in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_here_reads_what_could_run_code(path):
    assert dangers(path.read_text()) == []


def test_nor_do_the_examples_in_the_pages():
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    examples = [
        (page.name, code) for page in pages for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    ]
    assert examples
    assert [(name, found) for name, code in examples if (found := dangers(code))] == []
    for path in sorted((ROOT / "docs").rglob("*.py")):
        assert dangers(path.read_text()) == [], path


@pytest.mark.parametrize(
    "planted",
    [
        "import torch\ntorch.load('x')",
        "import torch as t\nt.load('x', weights_only=True)",
        "from torch import load\nload('x')",
        "from torch import load as read\nread('x')",
        "import torch\nread = torch.load\nread('x')",
        "import numpy as np\nnp.load('x')",
        "import numpy\nnumpy.load('x', allow_pickle=True)",
        "def f(archive, g): return g(archive, allow_pickle=True)",
        "from numpy import load as l\nl('x')",
        "import pickle",
        "import pickle as p\np.loads(b'')",
        "from pickle import loads",
        "from pickle import *",
        "def f():\n    import _pickle",
        "import joblib\njoblib.load('x')",
        "import yaml\nyaml.load('x')",
        "import shelve",
        "import marshal",
        "import dill",
        "eval('1')",
        "exec('1')",
        "x = eval",
        "import builtins as b\nb.exec('1')",
        "from builtins import eval as e\ne('1')",
        "compile('1', '', 'eval')",
        "def f(compile): return compile\ncompile('1', '', 'eval')",
        "def f(read=compile): return read",
        "import sympy\nsympy.sympify('1')",
        "import sympy as sp\nsp.sympify('1')",
        "from sympy import sympify as s\ns('1')",
        "from sympy.core.sympify import sympify",
        "from sympy import S\nS('1')",
        "from sympy.parsing.sympy_parser import parse_expr",
        "import pandas as pd\npd.read_pickle('x')",
        "from importlib import import_module\nimport_module('pickle')",
        "import importlib\nimportlib.import_module('marshal')",
        "import builtins\ngetattr(builtins, 'eval')('1')",
        "__import__('pickle')",
        "import torch.distributed as dist\ndist.all_gather_object([], 1)",
        "import torch\ntorch.jit.load('x')",
    ],
)  # fmt: skip
def test_a_planted_call_is_found(planted):
    assert dangers(planted), planted


@pytest.mark.parametrize(
    "harmless",
    [
        "import json\njson.load(open('x'))",
        "import re\nre.compile('x')",
        "import torch\ntorch.compile(f)\nmodel.eval()",
        "from safetensors.torch import load\nload(b'')",
        "import sympy as sp\nsp.Symbol('x') + sp.S.Half",
        "import numpy as np\nnp.load('x', allow_pickle=False)",
        "frame.eval",
        "def f(compile): return g(compile=compile)",
        "'eval(1)  # pickle'",
    ],
)
def test_what_is_harmless_is_not(harmless):
    assert dangers(harmless) == []


def test_the_check_sees_every_file():
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    ours = {
        ROOT / line
        for line in listed.stdout.splitlines()
        if line.startswith(("ufom_theory/", "ufom_runtime/", "studies/"))
    }
    assert ours <= set(PYTHON)
