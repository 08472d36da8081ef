"""Every link of the built site that stays on it leads to a file, and to an anchor there; run by `make docs`."""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlparse


class Page(HTMLParser):
    """Anchors and links of one page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect id, name, href and src."""
        for name, value in attrs:
            if value and (name == "id" or (tag == "a" and name == "name")):
                self.anchors.add(value)
            elif value and name in ("href", "src"):
                self.links.append(value)


def broken(root: Path) -> list[str]:
    """The links of all pages under `root` that lead nowhere; those to other sites are not looked at."""
    pages = {
        path: Page(path.read_text(encoding="utf-8")) for path in root.rglob("*.html")
    }
    found = []
    for path, page in pages.items():
        for link in page.links:
            url, anchor = urldefrag(link)
            if urlparse(url).scheme or url.startswith("//"):
                continue
            target = (
                (path.parent / unquote(urlparse(url).path)).resolve() if url else path
            )
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                found.append(f"{path.relative_to(root)}: {link}: no such file")
            elif (
                anchor
                and target in pages
                and unquote(anchor) not in pages[target].anchors
            ):
                found.append(f"{path.relative_to(root)}: {link}: no such anchor")
    return found


if __name__ == "__main__":
    root = Path(sys.argv[1]).resolve()
    found = broken(root)
    print(
        "\n".join(found)
        or f"every internal link of {len(list(root.rglob('*.html')))} pages leads somewhere"
    )
    sys.exit(bool(found))
