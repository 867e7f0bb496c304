"""Entries of the cache that were damaged or exchanged: the text that is read is always the text of the file."""

import json
import os
import shutil

import numpy as np
import pytest
from altered import altered, altered_bytes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from charlm.config import default_config
from charlm.data import corpus, entries
from charlm.system.cache import cache_dir
from charlm.system.errors import CorpusError

TEXT = "some text of a few symbols, " * 40


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Return (config of the text, a cache folder with its entry)."""
    folder = tmp_path_factory.mktemp("source")
    (folder / "text.txt").write_text(TEXT)
    data = default_config().data
    data.path = str(folder / "text.txt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CHARLM_CACHE", str(folder / "cache"))
        patch.setattr(entries, "_TIMESTAMP_RESOLUTION_NS", 0)
        corpus.load_corpus(data)
    return data, folder / "cache"


@pytest.fixture
def cache(source, tmp_path, monkeypatch):
    """Return the path of a copy of the cache, which is in use."""
    shutil.copytree(source[1], tmp_path / "cache")
    monkeypatch.setenv("CHARLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def entry_of(cache):
    (entry,) = (path for path in (cache / "corpora").iterdir() if path.is_dir() and path.suffix != ".damaged")
    return entry


def text_of(data):
    loaded = corpus.load_corpus(data)
    return "".join(loaded.vocab.decode(part) for part in (loaded.train, loaded.val, loaded.test))


SHARED = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.fuzz
@SHARED
@given(draw=st.data())
def test_an_altered_entry_never_gives_another_text(source, cache, draw):
    shutil.rmtree(cache / "corpora")
    shutil.copytree(source[1] / "corpora", cache / "corpora")
    path = entry_of(cache) / draw.draw(st.sampled_from(["ids.bin", "meta.json"]))
    sound = path.read_bytes()
    path.write_bytes(draw.draw(altered(json.loads(sound)) if path.suffix == ".json" else altered_bytes(sound)))
    assert text_of(source[0]) == TEXT


@pytest.mark.parametrize("damage", ["swapped", "folder", "pipe", "meta of another entry", "no meta"])
def test_a_damaged_entry_is_put_aside_named_and_created_again(source, cache, capfd, damage):
    entry = entry_of(cache)
    if damage == "swapped":
        ids = np.fromfile(entry / "ids.bin", np.uint8)
        ids[[3, 5]] = ids[[5, 3]]
        ids.tofile(entry / "ids.bin")
    elif damage == "folder":
        (entry / "meta.json").unlink()
        (entry / "meta.json").mkdir()
    elif damage == "pipe":
        (entry / "ids.bin").unlink()
        os.mkfifo(entry / "ids.bin")
    elif damage == "meta of another entry":
        other = default_config().data
        other.update(path=source[0].path, lowercase=True, split=(0.5, 0.4, 0.1))
        corpus.load_corpus(other)
        (other_entry,) = set(path for path in (cache / "corpora").iterdir() if path.is_dir()) - {entry}
        shutil.rmtree(entry)
        shutil.copytree(other_entry, entry)
        shutil.rmtree(other_entry)
    else:
        (entry / "meta.json").unlink()
    assert text_of(source[0]) == TEXT
    err = capfd.readouterr().err
    assert f"the cache entry {entry} of {source[0].path} is damaged: " in err and err.count("\n") == 1
    assert (cache / "corpora" / f"{entry.name}.damaged").is_dir()
    assert text_of(source[0]) == TEXT and not capfd.readouterr().err


def test_large_ids_are_hashed_once_while_they_are_unchanged(source, cache, monkeypatch):
    monkeypatch.setattr(entries, "_ALWAYS_HASHED_BYTES", 0)
    monkeypatch.setattr(entries, "_TIMESTAMP_RESOLUTION_NS", 0)
    hashed, sound = [], entries.file_sha256
    monkeypatch.setattr(entries, "file_sha256", lambda path, *rest: hashed.append(path) or sound(path, *rest))
    path = entry_of(cache) / "ids.bin"
    for _ in range(3):
        assert text_of(source[0]) == TEXT
    assert hashed == [path]
    content, times = bytearray(path.read_bytes()), path.stat()
    content[7] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert text_of(source[0]) == TEXT and len(hashed) > 1


def test_a_wrong_remembered_hash_of_a_text_is_ignored_or_forgotten(source, cache, capfd):
    (remembered,) = (cache / "fingerprints").iterdir()
    sound = remembered.read_text()
    shutil.rmtree(cache / "corpora")
    remembered.write_text(sound.replace(sound[0], "0" if sound[0] != "0" else "1", 1))
    assert text_of(source[0]) == TEXT
    # A wrong hash whose own check is right: somebody wrote it on purpose. The first start fails and forgets it.
    shutil.rmtree(cache / "corpora")
    wrong = "0" * 64
    remembered.write_text(f"{wrong} {entries.text_sha256(remembered.name + wrong)}\n")
    with pytest.raises(CorpusError, match="changed while it was read"):
        text_of(source[0])
    assert not remembered.exists() and text_of(source[0]) == TEXT
    assert cache_dir() == cache
