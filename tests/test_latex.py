"""All LaTeX of the pages of the proofs, as a reader copies it, compiles: by KaTeX, in a browser."""

import re
from pathlib import Path

from tests.runtime.test_explorer import browser, needs_browser  # noqa: F401

DOCS = Path(__file__).parents[1] / "docs"
RENDER = """return arguments[0].map(tex => {
  try { katex.renderToString(tex, {throwOnError: true, strict: "error"}); return "" }
  catch (error) { return tex + ": " + error.message }
})"""


def formulas() -> list[str]:
    """What stands between dollars."""
    texts = [path.read_text(encoding="utf-8") for path in sorted((DOCS / "proofs").glob("*.md"))]
    return [tex.strip("$ ") for text in texts for tex in re.findall(r"\$\$ .*? \$\$|\$\\displaystyle .*?\$", text)]


def test_every_page_has_formulas():
    assert len(formulas()) > 100
    assert all(tex.count("{") == tex.count("}") and "%s" not in tex for tex in formulas())


@needs_browser
def test_formulas_compile(browser):  # noqa: F811
    browser.get("data:text/html,<p>formulas</p>")
    browser.execute_script((DOCS / "_static" / "katex" / "katex.min.js").read_text(encoding="utf-8"))
    assert [error for error in browser.execute_script(RENDER, formulas()) if error] == []
