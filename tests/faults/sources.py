"""Faults of a data set's server: an archive that is cut, altered or another."""

import functools
import http.server
import os
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from tests.faults.common import refused
from ufom_runtime.problems.downloads import fetch
from ufom_runtime.problems.sources import SOURCES, Source


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def mirror(folder: Path, name: str, content: bytes, pin: str) -> Iterator[Path]:
    """MNIST is one file, on a server of our own; the folder where `fetch` would put it."""
    (folder / "web").mkdir(parents=True)
    (folder / "data").mkdir()
    (folder / "web" / name).write_bytes(content)
    handler = functools.partial(_Quiet, directory=folder / "web")
    clear = dict.fromkeys(("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"), "")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        source = Source((f"http://127.0.0.1:{server.server_port}/",), {name: pin})
        environment = mock.patch.dict(os.environ, {**clear, "UFOM_DATA": str(folder / "data")})
        with mock.patch.dict(SOURCES, {"mnist": source}), environment:
            yield folder / "data" / "mnist"
        server.shutdown()


def corrupt_archive(folder: Path) -> str:
    """a .gz and a .zip from a server, cut short and with a byte altered"""
    import gzip

    with zipfile.ZipFile(folder / "made.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/1", bytes(range(256)) * 64)
    made = {"x.gz": gzip.compress(bytes(range(256)) * 64), "x.zip": (folder / "made.zip").read_bytes()}
    for name, content in made.items():
        for altered in (content[:-9], content[:60] + bytes([content[60] ^ 255]) + content[61:]):
            at = folder / f"{name}-{len(altered)}"
            with mirror(at, name, altered, "sha256:" + "0" * 64) as place:
                said = refused(lambda: fetch("mnist"), "could not be fetched", "cannot be read")
                assert list(place.iterdir()) == []
    return said + ": cannot be read"


def wrong_checksum(folder: Path) -> str:
    """a whole .gz from a server, of other content"""
    import gzip

    with mirror(folder / "x", "x.gz", gzip.compress(b"other"), "sha256:" + "0" * 64) as place:
        said = refused(lambda: fetch("mnist"), "could not be fetched", "is not the original file")
        assert list(place.iterdir()) == []
    return said + ": is not the original file"
