"""The site: `make docs`. Warnings are errors; what a name, an equation or a link points at must exist."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

project, author = "ufom", "The ufom developers"
html_title = "ufom"
html_theme = "furo"
html_show_copyright = False
html_extra_path = ["_build/extra"]  # the explorer, which `extension` writes there
html_static_path = ["_static"]
html_css_files = ["katex/katex.min.css", "site.css"]
html_js_files = [
    "katex/katex.min.js",
    "site.js",
]  # KaTeX 0.16.22 as its authors ship it: formulas need no network
html_math_renderer = "katex"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_gallery.gen_gallery",
    "extension",
]
exclude_patterns = ["_build", "gallery"]
nitpicky = True
# other projects' names
OTHERS = r"(torch|numpy|collections|dataclasses|fractions|pandas|pd|sympy)\..*|Tensor"
nitpick_ignore_regex = [("py:class", OTHERS)]
nitpick_ignore = [
    ("py:class", "ufom_runtime.protocol.Method"),
    ("py:class", "Method"),
    ("py:class", "ufom_runtime.methods.debiased.Proxy"),
    ("py:class", "ufom_runtime.methods.debiased.Debiased"),
    ("py:exc", "ProcessLost"),
]

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3

default_role = "code"  # a docstring's `name` is code
autodoc_typehints = "none"  # docstrings give shapes and units, which types do not
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
napoleon_use_ivar = True

sphinx_gallery_conf = {
    "examples_dirs": "gallery",
    "gallery_dirs": "examples",
    "ignore_pattern": r"__init__\.py|plain\.py",  # what the pages share
    "image_scrapers": ("extension.figures",),
    "reset_modules": (),
    "abort_on_example_error": True,
    "download_all_examples": False,
    "show_signature": False,
    "write_computation_times": False,
    "show_memory": False,
}
