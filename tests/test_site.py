"""The built site in a browser, without a network: nothing is cut, formulas are rendered, dark is dark."""

from pathlib import Path

import pytest

from tests.runtime.test_explorer import browser, needs_browser  # noqa: F401

SITE = Path(__file__).parents[1] / "docs" / "_build" / "html"
PAGES = [p for p in sorted(SITE.rglob("*.html")) if not {"_modules", "_static"} & set(p.relative_to(SITE).parts)]
PAGES = [p for p in PAGES if p.name not in ("explorer.html", "search.html", "genindex.html", "py-modindex.html")]
CUT = """
const wide = innerWidth, found = []
if (document.documentElement.scrollWidth > wide) found.push("the page is wider than the window")
for (const table of document.querySelectorAll("article table")) {
  const box = table.getBoundingClientRect()
  if (box.width && (box.right > wide + 1 || table.parentElement.scrollWidth > table.parentElement.clientWidth + 1))
    found.push("a table is cut: " + table.textContent.trim().slice(0, 60))
}
for (const place of document.querySelectorAll(".math"))
  if (!place.querySelector(".katex-html") || place.querySelector(".katex-error"))
    found.push("not rendered: " + place.textContent.slice(0, 60))
for (const image of document.images) if (!image.naturalWidth) found.push("no image: " + image.src)
return found
"""
LIGHT = """
const bright = (colour) => colour.match(/[\\d.]+/g).slice(0, 3).reduce((sum, x) => sum + +x, 0) / 765
const style = getComputedStyle(document.body)
return [bright(style.color), bright(style.backgroundColor)]
"""


@pytest.fixture(scope="module")
def offline(browser):  # noqa: F811
    browser.execute_cdp_cmd("Network.enable", {})
    browser.execute_cdp_cmd("Network.setBlockedURLs", {"urls": ["http://*", "https://*"]})
    return browser


@needs_browser
@pytest.mark.skipif(not PAGES, reason="the site is not built: make docs")
def test_no_page_is_cut_and_every_formula_is_rendered(offline):
    found = {}
    for page in PAGES:
        for width in (1280, 390):
            size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
            offline.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            if width == 1280:
                offline.get(page.as_uri())
            found[f"{page.relative_to(SITE)}, {width} px"] = offline.execute_script(CUT)
    assert {where: what for where, what in found.items() if what} == {}


@needs_browser
@pytest.mark.skipif(not PAGES, reason="the site is not built: make docs")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_follows_the_colours_of_the_system(offline, scheme):
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    offline.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    offline.get((SITE / "index.html").as_uri())
    text, ground = offline.execute_script(LIGHT)
    assert (text < 0.3 and ground > 0.9) if scheme == "light" else (text > 0.7 and ground < 0.2)
