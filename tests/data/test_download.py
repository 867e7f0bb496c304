import hashlib
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from server import Server

from charlm.config import default_config
from charlm.data import corpora, corpus
from charlm.data.download import fetch
from charlm.system.errors import CorpusError

TEXT = ("The quick brown fox. " * 40).encode()
SHA256 = hashlib.sha256(TEXT).hexdigest()


@pytest.fixture
def server():
    server = Server(TEXT)
    yield server
    server.close()


def kept(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix != ".lock"} if folder.exists() else {}


def test_a_file_is_downloaded_once(server, tmp_path):
    for _ in range(2):
        assert fetch(server.url, SHA256, tmp_path / "d").read_bytes() == TEXT
    assert server.requests == [None] and kept(tmp_path / "d") == {SHA256: TEXT}


@given(cuts=st.lists(st.integers(0, len(TEXT) - 1), min_size=1, max_size=4), ranges=st.booleans(), length=st.booleans())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_an_interrupted_download_is_never_mistaken_for_the_file(server, tmp_path_factory, cuts, ranges, length):
    folder = tmp_path_factory.mktemp("d")
    server.cuts, server.ranges, server.length, server.requests = list(cuts), ranges, length, []
    for _ in range(len(cuts) + 1):
        try:
            fetch(server.url, SHA256, folder)
        except CorpusError as error:
            assert str(error).startswith(("cannot download http", "the download of http"))
            assert SHA256 not in kept(folder)
    server.cuts = []
    assert fetch(server.url, SHA256, folder).read_bytes() == TEXT
    assert kept(folder) == {SHA256: TEXT}


def test_a_download_continues_where_it_stopped(server, tmp_path):
    server.cuts = [100, 0]
    with pytest.raises(CorpusError, match="ended after 100 of 840 bytes; 100 bytes are kept, and the same command continues"):
        fetch(server.url, SHA256, tmp_path)
    assert kept(tmp_path) == {f"{SHA256}.part": TEXT[:100]}
    fetch(server.url, SHA256, tmp_path)
    assert server.requests == [None, "bytes=100-", "bytes=100-"]
    server.cuts, server.requests = [300, 200, 100], []
    (tmp_path / SHA256).unlink()
    assert fetch(server.url, SHA256, tmp_path).read_bytes() == TEXT
    assert server.requests == [None, "bytes=300-", "bytes=500-", "bytes=600-"]


@given(position=st.integers(0, len(TEXT) - 1), flip=st.integers(1, 255), cut=st.integers(1, len(TEXT)))
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_an_altered_download_is_refused_and_not_kept(server, tmp_path_factory, position, flip, cut):
    folder = tmp_path_factory.mktemp("d")
    altered = bytearray(TEXT)
    altered[position] ^= flip
    server.body, server.cuts = bytes(altered), [cut] if cut < len(TEXT) else []
    with pytest.raises(CorpusError, match=f"has the sha256 [0-9a-f]{{64}}, not {SHA256}: it was altered"):
        fetch(server.url, SHA256, folder)
    assert kept(folder) == {}


def test_a_partial_file_of_another_version_does_not_spoil_the_download(server, tmp_path):
    for stale in (b"an older text", TEXT[:99] + b"?", TEXT + b" and more", b"x" * len(TEXT)):
        (tmp_path / f"{SHA256}.part").write_bytes(stale)
        assert fetch(server.url, SHA256, tmp_path).read_bytes() == TEXT
        (tmp_path / SHA256).unlink()
    (tmp_path / SHA256).write_bytes(TEXT[:-1])
    assert fetch(server.url, SHA256, tmp_path).read_bytes() == TEXT


def test_a_complete_partial_file_needs_no_network(server, tmp_path):
    (tmp_path / f"{SHA256}.part").write_bytes(TEXT)
    assert fetch(server.url, SHA256, tmp_path).read_bytes() == TEXT and server.requests == []


def test_urls_may_contain_letters_of_any_script(server, tmp_path):
    assert fetch(server.url + "/é?ж=%C3%A9", SHA256, tmp_path).read_bytes() == TEXT


def test_concurrent_downloads_of_the_same_file_download_it_once(server, tmp_path):
    threads = [threading.Thread(target=fetch, args=(server.url, SHA256, tmp_path)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.requests == [None] and kept(tmp_path) == {SHA256: TEXT}


def test_errors_of_servers_and_invalid_urls_are_reported(server, tmp_path):
    server.status = 404
    with pytest.raises(CorpusError, match="text.txt: the server answered 404 Not Found"):
        fetch(server.url, SHA256, tmp_path)
    server.close()
    with pytest.raises(CorpusError, match="Connection refused.*; or set data.path to a copy of the file"):
        fetch(server.url, SHA256, tmp_path)
    with pytest.raises(CorpusError, match="cannot download http://no.such.host.invalid/text.txt: .*or set data.path"):
        fetch("http://no.such.host.invalid/text.txt", SHA256, tmp_path)
    for url in ("http://a..b/x", f"http://{'a' * 70}.org/x", "http://[::1/x", "http://127.0.0.1:99999/x"):
        with pytest.raises(CorpusError, match="cannot download http"):
            fetch(url, SHA256, tmp_path)
    assert kept(tmp_path) == {}
    server._http.server_close = server._http.shutdown = lambda: None


def test_a_folder_that_cannot_be_written_is_reported(server, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CorpusError, match="cannot write the download of .*set CHARLM_CACHE to another folder"):
        fetch(server.url, SHA256, tmp_path / "file")


def test_a_corpus_is_loaded_from_a_url(server, tmp_path, monkeypatch):
    monkeypatch.setenv("CHARLM_CACHE", str(tmp_path))
    options = default_config().data
    options.update(url=server.url, sha256=SHA256)
    loaded = corpus.load_corpus(options)
    assert loaded.name == server.url and loaded.sha256 == SHA256
    assert loaded.vocab.decode(loaded.train) == TEXT.decode()[: len(TEXT) * 9 // 10]
    server.body = b"altered" + TEXT[7:]
    assert corpus.load_corpus(options).sha256 == SHA256  # The file is downloaded already.
    options.sha256 = hashlib.sha256(TEXT + b"?").hexdigest()
    with pytest.raises(CorpusError, match="it was altered"):
        corpus.load_corpus(options)
    assert len([path for path in (tmp_path / "corpora").iterdir() if path.is_dir()]) == 1


def test_tiny_shakespeare_is_downloaded(server, tmp_path, monkeypatch):
    monkeypatch.setenv("CHARLM_CACHE", str(tmp_path))
    monkeypatch.setitem(corpora.CORPORA, "tinyshakespeare", corpora.Download(server.url, SHA256))
    options = default_config().data
    options.corpus = "tinyshakespeare"
    loaded = corpus.load_corpus(options)
    assert loaded.name == "tinyshakespeare"
    assert len(loaded.train) == int(0.9 * len(TEXT)) and len(loaded.val) == len(TEXT) - len(loaded.train)
