import hashlib
import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from charlm.config import default_config
from charlm.data import corpus, text
from charlm.data import entries as cache_entries
from charlm.data.vocab import UNKNOWN
from charlm.system.cache import cache_dir
from charlm.system.errors import CorpusError


def data(**changes):
    options = default_config().data
    options.update(changes)
    return options


@pytest.fixture
def write(tmp_path):
    def write_file(content: bytes | str, name="text.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return str(tmp_path / name)

    return write_file


def decoded(loaded):
    return [loaded.vocab.decode(part) for part in (loaded.train, loaded.val, loaded.test)]


@given(st.text(st.sampled_from("ab\n\rÉΣ漢🙂"), min_size=1, max_size=60), st.sampled_from(["chars", "bytes"]), st.booleans())
@settings(max_examples=60)
def test_the_three_parts_make_up_the_text(tmp_path_factory, content, vocab, lowercase):
    path = tmp_path_factory.mktemp("c") / "t.txt"
    path.write_bytes(content.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "PIECE_BYTES", 7)
        loaded = corpus.load_corpus(data(path=str(path), vocab=vocab, lowercase=lowercase, split=(0.6, 0.3, 0.1)))
    parts = decoded(loaded)
    whole = text.normalise(content, False)
    if lowercase:
        assert "".join(parts) == "".join(line.lower() for line in whole.splitlines(keepends=True))
    else:
        assert "".join(parts) == whole
        ends = [int(len(whole) * f + 1e-9) for f in (0.6, 0.9)]
        assert parts == [whole[: ends[0]], whole[ends[0] : ends[1]], whole[ends[1] :]]


def test_the_last_tenth_of_a_file_is_for_validation(write):
    loaded = corpus.load_corpus(data(path=write("abcdefghij" * 10)))
    assert decoded(loaded) == ["abcdefghij" * 9, "abcdefghij", ""]
    assert loaded.vocab.symbols == "abcdefghij" and loaded.train.dtype == np.uint8


def test_a_large_vocabulary_has_ids_of_two_bytes(write):
    content = "".join(map(chr, range(0x4E00, 0x4E00 + 400)))
    loaded = corpus.load_corpus(data(path=write(content), split=(1, 0, 0)))
    assert loaded.train.dtype == np.uint16 and decoded(loaded) == [content, "", ""]


def entries():
    return sorted(path for path in (cache_dir() / "corpora").iterdir() if path.is_dir() and path.suffix != ".damaged")


def test_a_text_is_read_again_only_if_it_may_have_changed(write, monkeypatch, tmp_path):
    monkeypatch.setenv("CHARLM_CACHE", str(tmp_path / "cache"))
    files_sha256, reads = text.files_sha256, []
    monkeypatch.setattr(text, "files_sha256", lambda *args: reads.append(args) or files_sha256(*args))
    path = write("some text " * 20)

    def count_reads():
        reads.clear()
        loaded = corpus.load_corpus(data(path=path))
        assert loaded.sha256 == hashlib.sha256(open(path, "rb").read()).hexdigest()
        return len(reads)

    # A file that was written a moment ago could change again and keep its timestamps.
    assert count_reads() == 2 and count_reads() == 1
    monkeypatch.setattr(cache_entries, "_TIMESTAMP_RESOLUTION_NS", 0)
    assert count_reads() == 1 and count_reads() == 0 and count_reads() == 0
    times = os.stat(path)
    write("same text " * 20)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # The size and the modification time are unchanged.
    assert count_reads() == 2 and count_reads() == 0
    for cached in (tmp_path / "cache" / "fingerprints").iterdir():
        cached.write_text("damaged")
    assert count_reads() == 1


def test_a_text_is_encoded_once_and_again_if_it_or_an_option_changes(write, monkeypatch, tmp_path):
    monkeypatch.setenv("CHARLM_CACHE", str(tmp_path / "cache"))
    first = corpus.load_corpus(data(path=write("some text " * 20)))
    (entry,) = entries()
    monkeypatch.setattr(corpus, "_encode", None)  # A call would fail.
    same = corpus.load_corpus(data(path=write("some text " * 20, "elsewhere.txt")))
    assert decoded(same) == decoded(first) and same.sha256 == first.sha256
    monkeypatch.undo()
    monkeypatch.setenv("CHARLM_CACHE", str(tmp_path / "cache"))
    for changed in (
        {"path": write("other text" * 20, "other.txt")},
        {"path": write("some text " * 20), "vocab": "bytes"},
        {"path": write("some text " * 20), "lowercase": True},
        {"path": write("some text " * 20), "split": (0.5, 0.5, 0)},
        {"path": write("some text " * 20), "max_symbols": 3},
        {"path": write("some text " * 20), "unknown": True},
    ):
        before = len(entries())
        corpus.load_corpus(data(**changed))
        assert len(entries()) == before + 1
    assert entry in entries()


@pytest.mark.parametrize("damage", ["truncate", "remove", "garble"])
def test_a_damaged_cache_entry_is_replaced(write, monkeypatch, tmp_path, damage):
    monkeypatch.setenv("CHARLM_CACHE", str(tmp_path / "cache"))
    options = data(path=write("some text " * 20))
    expected = decoded(corpus.load_corpus(options))
    (entry,) = entries()
    if damage == "truncate":
        os.truncate(entry / "ids.bin", 7)
    elif damage == "remove":
        (entry / "meta.json").unlink()
    else:
        (entry / "meta.json").write_text('{"vocab": 3')
    assert decoded(corpus.load_corpus(options)) == expected
    assert entries() == [entry]


def test_a_failed_encoding_leaves_no_cache_entry(write, monkeypatch, tmp_path):
    monkeypatch.setenv("CHARLM_CACHE", str(tmp_path / "cache"))
    with pytest.raises(CorpusError, match="not UTF-8: byte 0xff at byte offset 3"):
        corpus.load_corpus(data(path=write(b"abc\xffdef")))
    assert not (tmp_path / "cache").exists() or not entries()


def test_the_built_in_corpus_holds_out_the_end_of_every_play():
    loaded = corpus.load_corpus(data())
    plays = [text.play_text(path.read_text(encoding="utf-8")) for path in text.play_paths()]
    train, val, test = decoded(loaded)
    assert loaded.sha256 == text.SHAKESPEARE_SHA256 and loaded.name == "shakespeare"
    assert len(train) + len(val) + len(test) == sum(map(len, plays))
    assert train.startswith(plays[0][: int(0.9 * len(plays[0]))])
    for play in plays:
        ends = int(0.9 * len(play) + 1e-9), int(0.95 * len(play) + 1e-9)
        assert play[: ends[0]] in train and play[ends[0] : ends[1]] in val and play[ends[1] :] in test


def test_a_scored_text_is_encoded_with_the_vocabulary_of_the_corpus(write):
    loaded = corpus.load_corpus(data(path=write("abc " * 10)))
    ids = corpus.encode_file(write("cab\r\n".replace("\r\n", " "), "other.txt"), loaded.vocab, False)
    assert loaded.vocab.decode(ids) == "cab "
    with pytest.raises(
        CorpusError, match=r"other.txt: symbol 'd' at position 2 is not in the vocabulary of 4 symbols: ' abc'; a model"
    ):
        corpus.encode_file(write("abd", "other.txt"), loaded.vocab, False)


def test_a_text_that_changes_while_it_is_read_is_not_cached(write, monkeypatch, tmp_path):
    monkeypatch.setenv("CHARLM_CACHE", str(tmp_path / "cache"))
    path = write("before " * 20)
    read_pieces = text.read_pieces
    for change in ("after " * 20, "longer " * 99):

        def changing(*args, change=change):
            write(change)  # After the text was hashed.
            return read_pieces(*args)

        with monkeypatch.context() as patch:
            patch.setattr(text, "read_pieces", changing)
            with pytest.raises(CorpusError, match="changed while it was read"):
                corpus.load_corpus(data(path=path))
        assert not entries()
        write("before " * 20)
    assert decoded(corpus.load_corpus(data(path=path))) == ["before " * 18, "before " * 2, ""]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no /dev/full")
def test_a_full_disk_is_one_line_and_leaves_no_cache_entry(write, monkeypatch, tmp_path):
    monkeypatch.setenv("CHARLM_CACHE", str(tmp_path / "cache"))
    options = data(path=write("some text " * 20))
    with monkeypatch.context() as patch:
        patch.setattr(corpus.tempfile, "TemporaryFile", lambda dir: open("/dev/full", "w+b", 0))
        with pytest.raises(CorpusError, match="cannot write .*: No space left on device; set CHARLM_CACHE to another folder"):
            corpus.load_corpus(options)
    assert not entries() and decoded(corpus.load_corpus(options))[0] == "some text " * 18


def test_concurrent_loads_of_the_same_text_encode_it_once(write, monkeypatch, tmp_path):
    monkeypatch.setenv("CHARLM_CACHE", str(tmp_path / "cache"))
    options = data(path=write("some text " * 20))
    encode, calls = corpus._encode, []

    def slow(*args):
        calls.append(args)
        time.sleep(0.3)
        return encode(*args)

    monkeypatch.setattr(corpus, "_encode", slow)
    with ThreadPoolExecutor(3) as pool:
        loaded = list(pool.map(lambda _: corpus.load_corpus(options), range(3)))
    assert len(calls) == 1 and len(entries()) == 1
    assert [decoded(each) for each in loaded] == [decoded(loaded[0])] * 3


def test_the_partial_entry_of_a_killed_process_is_removed(write, monkeypatch, tmp_path):
    monkeypatch.setenv("CHARLM_CACHE", str(tmp_path / "cache"))
    options = data(path=write("some text " * 20))
    corpus.load_corpus(options)
    (entry,) = entries()
    partial = entry.with_name(entry.name + ".partial")
    entry.rename(partial)
    (partial / "meta.json").unlink()
    corpus.load_corpus(options)
    assert entries() == [entry]


def texts_of(loaded):
    return "".join(decoded(loaded))


def test_a_directory_is_read_in_the_order_of_its_paths(write, tmp_path):
    for name, content in {
        "b.txt": "second,", "a/z.txt": "first,", "b/a.txt": "fourth,", "b-c.txt": "third,", "c.txt": "fifth",
        ".hidden": "no", ".git/x.txt": "no",
    }.items():  # fmt: skip
        write(content, f"books/{name}")
    # Paths are compared part by part: "a" < "b" < "b-c.txt" < "b.txt" < "c.txt".
    expected = ["first,", "fourth,", "third,", "second,", "fifth"]
    loaded = corpus.load_corpus(data(path=str(tmp_path / "books")))
    assert texts_of(loaded) == "\n".join(expected)
    loaded = corpus.load_corpus(data(path=str(tmp_path / "books" / "*.txt"), separator="<|>"))
    assert texts_of(loaded) == "third,<|>second,<|>fifth"
    loaded = corpus.load_corpus(data(path=str(tmp_path / "books" / "**" / "?.txt"), separator=""))
    assert texts_of(loaded) == "first,fourth,second,fifth"


def test_a_file_with_several_paths_is_read_once(write, tmp_path):
    write("one", "books/a/1.txt"), write("two", "books/2.txt")
    (tmp_path / "books" / "a" / "self").symlink_to(tmp_path / "books")
    (tmp_path / "books" / "z.txt").symlink_to(tmp_path / "books" / "2.txt")
    for path in ("books", "books/**/*.txt", "books/**/**/*.txt"):
        assert texts_of(corpus.load_corpus(data(path=str(tmp_path / path), separator="|"))) == "two|one"


def test_a_separator_is_converted_like_the_text(write, tmp_path):
    write("A", "books/1.txt"), write("B", "books/2.txt")
    loaded = corpus.load_corpus(data(path=str(tmp_path / "books"), separator="<END>\r\n", lowercase=True))
    assert texts_of(loaded) == "a<end>\nb"


def test_the_sha256_depends_on_every_file_on_the_order_and_on_the_separator(write, tmp_path):
    for i in range(3):
        write(f"text {i} " * 20, f"books/{i}.txt")
    path = str(tmp_path / "books")
    hashes = {corpus.load_corpus(data(path=path)).sha256}
    hashes.add(corpus.load_corpus(data(path=path, separator="-")).sha256)
    write("text 1 " * 21, "books/1.txt")
    hashes.add(corpus.load_corpus(data(path=path)).sha256)
    (tmp_path / "books" / "1.txt").rename(tmp_path / "books" / "3.txt")
    hashes.add(corpus.load_corpus(data(path=path)).sha256)
    assert len(hashes) == 4


def test_a_path_without_readable_text_is_refused(write, tmp_path):
    write("x", "empty/.hidden")
    for path in (tmp_path / "empty", tmp_path / "*.epub"):
        with pytest.raises(CorpusError, match="contains no file; name a UTF-8 text file, a directory"):
            corpus.load_corpus(data(path=str(path)))
    with pytest.raises(CorpusError, match="none.txt does not exist"):
        corpus.load_corpus(data(path=str(tmp_path / "none.txt")))
    with pytest.raises(CorpusError, match=r"cannot read data.path a{100}\.\.\.: File name too long"):
        corpus.load_corpus(data(path="a" * 300))
    write(b"\xff", "mixed/b.txt"), write("a", "mixed/a.txt")
    with pytest.raises(CorpusError, match=r"mixed/b.txt is not UTF-8: byte 0xff at byte offset 0"):
        corpus.load_corpus(data(path=str(tmp_path / "mixed")))


@pytest.mark.parametrize("vocab", ["chars", "bytes"])
def test_symbols_per_char_is_measured_on_the_training_text(write, vocab):
    loaded = corpus.load_corpus(data(path=write("aé漢🙂" * 9 + "a" * 4), vocab=vocab))
    assert loaded.symbols_per_char == (1.0 if vocab == "chars" else 2.5)


def test_a_limited_vocabulary_has_an_unknown_symbol(write):
    content = "aaaaaaaabbbbbbccccd" * 10
    loaded = corpus.load_corpus(data(path=write(content), max_symbols=2))
    assert loaded.vocab.symbols == "ab" + UNKNOWN
    assert texts_of(loaded) == content.replace("c", UNKNOWN).replace("d", UNKNOWN)
    loaded = corpus.load_corpus(data(path=write("abc" * 10), unknown=True))
    ids = corpus.encode_file(write("abxyc", "other.txt"), loaded.vocab, False)
    assert loaded.vocab.decode(ids) == f"ab{UNKNOWN}{UNKNOWN}c"
