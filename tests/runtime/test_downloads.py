"""Fetching from a server of our own; the pins against the real files, where they are."""

import functools
import gzip
import hashlib
import http.server
import sys
import threading
import zipfile

import pytest

from tests.runtime.conftest import needs_data
from ufom_runtime.problems import data, sources
from ufom_runtime.problems.downloads import fetch
from ufom_runtime.problems.sources import SOURCES, Source, content_digest
from ufom_theory import UfomError


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture
def web(tmp_path, monkeypatch):
    """(the folder that is served, its address); UFOM_DATA is another folder."""
    served, kept = tmp_path / "web", tmp_path / "data"
    served.mkdir(), kept.mkdir()
    monkeypatch.setenv("UFOM_DATA", str(kept))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=served)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield served, f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def put(folder, name, content):
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)


def test_recompressed_files_are_as_good_and_mirrors_are_tried_in_turn(web, tmp_path, monkeypatch):
    served, address = web
    pin = "sha256:" + hashlib.sha256(b"content").hexdigest()
    put(served / "wrong", "x.gz", gzip.compress(b"other content"))
    put(served / "broken", "x.gz", b"no gzip")
    put(served / "good", "x.gz", gzip.compress(b"content", 1))
    mirrors = ["http://127.0.0.1:9/", *(f"{address}{name}/" for name in ("missing", "wrong", "broken", "good"))]
    monkeypatch.setitem(SOURCES, "mnist", Source(tuple(mirrors), {"x.gz": pin}))
    assert fetch("mnist") == [tmp_path / "data" / "mnist" / "x.gz"]
    assert gzip.decompress((tmp_path / "data" / "mnist" / "x.gz").read_bytes()) == b"content"
    assert fetch("mnist") == []  # it is there
    assert [p.name for p in (tmp_path / "data" / "mnist").iterdir()] == ["x.gz"]


def test_what_no_mirror_has_is_named_with_every_reason(web, tmp_path, monkeypatch):
    served, address = web
    put(served / "wrong", "x.tar.gz", b"other")
    mirrors = tuple(f"{address}{name}/" for name in ("missing", "wrong"))
    monkeypatch.setitem(SOURCES, "cifar100", Source(mirrors, {"x.tar.gz": "md5:" + "0" * 32}))
    with pytest.raises(UfomError, match=r"x\.tar\.gz could not be fetched.*missing.*404.*wrong.*md5 .* instead of 000"):
        fetch("cifar100")
    assert list((tmp_path / "data" / "cifar100").iterdir()) == []
    good = hashlib.md5(b"other").hexdigest()
    monkeypatch.setitem(SOURCES, "cifar100", Source(mirrors, {"x.tar.gz": f"md5:{good}"}))
    assert len(fetch("cifar100")) == 1


def test_without_a_connection_it_says_so_in_one_line(web, tmp_path, monkeypatch):
    monkeypatch.setitem(SOURCES, "mnist", Source(("http://127.0.0.1:9/", "http://none.invalid/"), {"x.gz": "md5:0"}))
    with pytest.raises(UfomError) as caught:
        fetch("mnist")
    assert str(caught.value) == (
        "x.gz could not be fetched: http://127.0.0.1:9/: no connection; http://none.invalid/: no connection; put it "
        f"into {tmp_path / 'data' / 'mnist'} by hand"
    )


def test_a_zip_is_known_by_its_files_not_by_its_bytes(tmp_path, monkeypatch):
    def make(name, files, kind):
        with zipfile.ZipFile(tmp_path / name, "w", kind) as out:
            for file, content in files:
                out.writestr(file, content)
        return content_digest(tmp_path / name)

    files = [("a/", b""), ("a/1", b"one"), ("a/2", b"two")]
    one = make("1.zip", files, zipfile.ZIP_STORED)
    assert make("2.zip", files[:0:-1], zipfile.ZIP_DEFLATED) == one
    assert make("3.zip", [("a/1", b"onet"), ("a/2", b"wo")], zipfile.ZIP_STORED) != one
    assert make("4.zip", [("a/1", b"one"), ("b/2", b"two")], zipfile.ZIP_STORED) != one
    monkeypatch.setattr(sources, "MOST_BYTES", 5)
    with pytest.raises(UfomError, match=r"1\.zip decodes to more than 5 bytes"):
        content_digest(tmp_path / "1.zip")
    (tmp_path / "x.gz").write_bytes(gzip.compress(b"123456"))
    with pytest.raises(UfomError, match=r"x\.gz decodes to more than 5 bytes"):
        content_digest(tmp_path / "x.gz")


@needs_data
def test_the_pins_are_those_of_the_real_files():
    for name in ("mnist", "omniglot"):
        for file, pin in SOURCES[name].files.items():
            assert "sha256:" + content_digest(sources.data_folder() / name / file) == pin


def test_bad_input_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("UFOM_DATA", str(tmp_path))
    with pytest.raises(UfomError, match="unknown: fetch mnist, omniglot, cifar100"):
        fetch("imagenet")
    with pytest.raises(UfomError, match=r"run `ufom data cifar100`"):
        data.cifar100()
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(ModuleNotFoundError, match="pip install"):
        fetch("mnist")
