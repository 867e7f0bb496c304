"""Which text is for training, validation and test: fractions, numbers of symbols, and files for each part."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from charlm.config import default_config, rules
from charlm.data import corpus, text
from charlm.system.errors import ConfigError, CorpusError


def data(**changes):
    options = default_config().data
    options.update(changes)
    return options


def decoded(loaded):
    return [loaded.vocab.decode(part) for part in (loaded.train, loaded.val, loaded.test)]


@given(
    content=st.binary(max_size=9).map(lambda tail: tail.decode("utf-8", "ignore"))
    | st.text(st.sampled_from("ab\n\r\ufeffÉ漢🙂"), min_size=1, max_size=40),
    draw=st.data(),
)
@settings(max_examples=60)
def test_numbers_of_bytes_cut_the_bytes_of_the_file(tmp_path_factory, content, draw):
    """A part may end inside a character, and every byte of the file stays as it is."""
    whole = ("a" + content).encode()
    ends = sorted(draw.draw(st.tuples(*[st.integers(1, len(whole))] * 2)))
    split = (ends[0], ends[1] - ends[0], len(whole) - ends[1])
    path = tmp_path_factory.mktemp("s") / "t.txt"
    path.write_bytes(whole)
    if sum(split) == 1:  # (1, 0, 0) holds fractions.
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "PIECE_BYTES", 7)
        loaded = corpus.load_corpus(data(path=str(path), vocab="bytes", split=split))
    parts = loaded.train, loaded.val, loaded.test
    assert tuple(map(len, parts)) == split and np.concatenate(parts).tobytes() == whole
    decode = loaded.vocab.decoder()
    assert "".join(decode(part) for part in parts) == whole.decode()
    chars = loaded.vocab.num_chars(loaded.train)
    assert loaded.symbols_per_char == split[0] / max(chars, 1)


def test_numbers_of_characters_cut_the_text_as_it_is_read(tmp_path):
    (tmp_path / "t.txt").write_bytes("aé漢🙂\r\n".encode() * 10)
    loaded = corpus.load_corpus(data(path=str(tmp_path / "t.txt"), split=(7, 3, 40)))
    assert decoded(loaded) == ["aé漢🙂\naé", "漢🙂\n", "aé漢🙂\n" * 8]


def test_a_text_may_be_longer_than_the_numbers_but_not_shorter(tmp_path, capfd):
    (tmp_path / "t.txt").write_text("abcdefghij" * 5)
    for vocab in ("chars", "bytes"):
        loaded = corpus.load_corpus(data(path=str(tmp_path / "t.txt"), vocab=vocab, split=(10, 2, 3)))
        assert decoded(loaded) == ["abcdefghij", "ab", "cde"]
        assert "data.split uses the first 15 of 50 symbols of" in capfd.readouterr().err
        with pytest.raises(CorpusError, match=r"data.split \(40, 9, 2\) needs 51 symbols, but .*t.txt has 50"):
            corpus.load_corpus(data(path=str(tmp_path / "t.txt"), vocab=vocab, split=(40, 9, 2)))


def test_numbers_of_bytes_may_cut_off_the_end_of_the_file_but_it_must_be_utf_8(tmp_path):
    (tmp_path / "t.txt").write_bytes("abc漢".encode()[:-1])  # As a file that is cut after so many bytes.
    loaded = corpus.load_corpus(data(path=str(tmp_path / "t.txt"), vocab="bytes", split=(3, 1, 1)))
    assert loaded.val.tobytes() + loaded.test.tobytes() == b"\xe6\xbc"
    (tmp_path / "t.txt").write_bytes(b"abc\xffdef")
    with pytest.raises(CorpusError, match="is not UTF-8: byte 0xff at byte offset 3"):
        corpus.load_corpus(data(path=str(tmp_path / "t.txt"), vocab="bytes", split=(3, 1, 1)))


@pytest.mark.parametrize("vocab", ["chars", "bytes"])
def test_each_part_may_have_files_of_its_own(tmp_path, vocab):
    for name, content in {"train": "aé" * 30, "val": "éb" * 5, "test": "c" * 7}.items():
        (tmp_path / f"{name}.txt").write_text(content)
    train, val, test = (str(tmp_path / f"{name}.txt") for name in ("train", "val", "test"))
    loaded = corpus.load_corpus(data(path=train, val_path=val, test_path=test, vocab=vocab))
    assert decoded(loaded) == ["aé" * 30, "éb" * 5, "c" * 7]
    assert vocab == "bytes" or loaded.vocab.symbols == "abcé"  # A symbol of any part is known.
    assert decoded(corpus.load_corpus(data(path=train, val_path=val, vocab=vocab))) == ["aé" * 30, "éb" * 5, ""]
    assert decoded(corpus.load_corpus(data(path=train, test_path=test, vocab=vocab))) == ["aé" * 27, "aé" * 3, "c" * 7]
    split = (50, 10, 0)
    if vocab == "chars":
        loaded = corpus.load_corpus(data(path=train, test_path=test, split=split))
        assert decoded(loaded) == ["aé" * 25, "aé" * 5, "c" * 7]


def test_a_change_in_any_part_is_another_corpus(tmp_path):
    for name in ("train", "val", "test"):
        (tmp_path / f"{name}.txt").write_text(f"{name} text " * 9)
    train, val, test = (str(tmp_path / f"{name}.txt") for name in ("train", "val", "test"))
    hashes = [corpus.load_corpus(data(path=train)).sha256]
    assert hashes[0] == hashlib.sha256((tmp_path / "train.txt").read_bytes()).hexdigest()
    hashes.append(corpus.load_corpus(data(path=train, val_path=val, test_path=test)).sha256)
    hashes.append(corpus.load_corpus(data(path=train, val_path=test, test_path=val)).sha256)
    (tmp_path / "test.txt").write_text("changed " * 9)
    hashes.append(corpus.load_corpus(data(path=train, val_path=val, test_path=test)).sha256)
    assert len(set(hashes)) == 4


def test_a_text_in_two_parts_is_refused(tmp_path):
    (tmp_path / "books").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "books" / name).write_text("some text " * 9)
    (tmp_path / "hard.txt").hardlink_to(tmp_path / "books" / "b.txt")
    (tmp_path / "soft.txt").symlink_to(tmp_path / "books" / "b.txt")
    for name in ("books/b.txt", "hard.txt", "soft.txt"):
        with pytest.raises(CorpusError, match="b.txt belongs to two of data.path, data.val_path and data.test_path"):
            corpus.load_corpus(data(path=str(tmp_path / "books"), val_path=str(tmp_path / name)))
    with pytest.raises(CorpusError, match="data.test_path .*none.txt does not exist"):
        corpus.load_corpus(data(path=str(tmp_path / "books"), test_path=str(tmp_path / "none.txt")))


@pytest.mark.parametrize("content, flags", [("", []), ("\n\n", ["--config.data.documents=lines", "--config.eval.context=0"])])
def test_a_text_for_validation_or_test_must_not_be_empty(tmp_path, run, small_config, content, flags):
    (tmp_path / "empty.txt").write_text(content)
    for key in ("val_path", "test_path"):
        for _ in range(2):  # The second time, the text comes from the cache.
            flag = f"--config.data.{key}={tmp_path / 'empty.txt'}"
            code, _, err = run("train", f"--config={small_config}", f"--workdir={tmp_path / 'run'}", flag, *flags)
            assert (
                code == 2 and err.startswith(f"charlm: data.{key} {tmp_path / 'empty.txt'} is empty") and err.count("\n") == 1
            )
            assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "key, changes, match",
    [
        ("split", {"split": (10, 5, 5.0)}, "three fractions .* or three integers"),
        ("split", {"split": (-1, 5, 5)}, "three integers"),
        ("split", {"split": (0, 5, 5)}, "with train above 0"),
        ("split", {"split": (True, 5, 5)}, "three integers"),
        ("split", {"path": "a", "val_path": "b", "split": (0.9, 0.1, 0.0)}, "data.split must be unset"),
        ("split", {"path": "a", "test_path": "b", "split": (0.8, 0.1, 0.1)}, "the third part must be 0"),
        ("split", {"path": "a", "vocab": "bytes", "lowercase": True, "split": (9, 1, 1)}, "data.lowercase must be False"),
        ("val_path", {"val_path": "b"}, "it belongs to data.path or data.url"),
        ("test_path", {"test_path": "b", "corpus": "text8"}, "it belongs to data.path or data.url"),
        ("path", {"path": "a", "corpus": "mine:text"}, "set only one of the two keys"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(key, changes, match):
    config = default_config()
    for name, value in changes.items():
        rules.set_key(config, f"data.{name}", value, "test")
    with pytest.raises(ConfigError, match=rf"^test: data.{key} is .*{match}"):
        rules.check(config, "test")


def test_three_integers_that_sum_to_one_are_fractions(tmp_path):
    (tmp_path / "t.txt").write_text("abc" * 9)
    assert decoded(corpus.load_corpus(data(path=str(tmp_path / "t.txt"), split=(1, 0, 0)))) == ["abc" * 9, "", ""]
