from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from charlm.data.vocab import NUM_CODE_POINTS, UNKNOWN, Vocab, count_code_points, utf8_transitions
from charlm.system.errors import CorpusError

TEXTS = st.text(st.characters(codec="utf-8"))


@given(TEXTS.filter(bool))
def test_chars_round_trip(text):
    vocab = Vocab.from_chars(set(text))
    ids = vocab.encode(text)
    assert vocab.decode(ids) == text
    assert ids.dtype == vocab.dtype
    assert sorted(set(ids.tolist())) == list(range(vocab.size))


@given(TEXTS)
def test_bytes_round_trip(text):
    vocab = Vocab.all_bytes()
    assert vocab.encode(text).tobytes() == text.encode()
    assert vocab.decode(vocab.encode(text)) == text


@given(TEXTS, st.integers(1, 5), st.integers(0, 3))
def test_a_decoder_of_bytes_never_returns_an_incomplete_character(text, size, cut):
    vocab = Vocab.all_bytes()
    ids, decode = vocab.encode(text), vocab.decoder()
    ids = ids[: max(len(ids) - cut, 0)]
    pieces = [decode(ids[i : i + size]) for i in range(0, len(ids), size)]
    whole = ids.tobytes().decode(errors="ignore")
    assert "".join(pieces) == whole == vocab.decode(ids) and text.startswith(whole)


@given(st.binary(max_size=6) | TEXTS.map(str.encode))
def test_the_automaton_accepts_exactly_utf_8(content):
    table, state = utf8_transitions(), 0
    for byte in content:
        state = table[state, byte] if state >= 0 else -1
    try:
        content.decode()
        assert state == 0
    except UnicodeDecodeError as error:
        assert (state > 0) == (error.reason == "unexpected end of data")


def test_the_automaton_accepts_every_character():
    table = utf8_transitions()
    points = np.array([p for p in range(NUM_CODE_POINTS) if not 0xD800 <= p < 0xE000], "<u4")
    for length, first, last in ((1, 0, 0x80), (2, 0x80, 0x800), (3, 0x800, 0x10000), (4, 0x10000, NUM_CODE_POINTS)):
        chars = points[(points >= first) & (points < last)].tobytes().decode("utf-32-le").encode()
        state = np.zeros(len(chars) // length, np.int32)
        for byte in np.frombuffer(chars, np.uint8).reshape(-1, length).T:
            state = table[state, byte]
            assert (state >= 0).all()
        assert (state == 0).all()


@pytest.mark.parametrize("size, dtype", [(256, np.uint8), (257, np.uint16), (1 << 16, np.uint16), ((1 << 16) + 1, np.uint32)])
def test_ids_have_the_smallest_possible_dtype(size, dtype):
    points = [p for p in range(size + 3000) if not 0xD800 <= p < 0xE000][:size]
    vocab = Vocab.from_chars(map(chr, points))
    assert vocab.dtype == dtype
    assert vocab.encode(vocab.symbols).tolist() == list(range(size))


@given(TEXTS.filter(bool), st.characters(codec="utf-8"), st.integers(0, 5))
def test_a_missing_symbol_is_reported_with_its_position_in_the_whole_text(text, other, earlier):
    vocab = Vocab.from_chars(set(text) - {other} or {"a" if other != "a" else "b"})
    known = "".join(c for c in text if c in vocab.symbols)
    encode = vocab.encoder()
    for _ in range(earlier):
        encode(known)
    with pytest.raises(CorpusError) as error:
        encode(known + other)
    assert f"symbol {other!r} at position {(earlier + 1) * len(known)} " in str(error.value)


@given(TEXTS.filter(bool), TEXTS)
def test_missing_symbols_become_the_unknown_symbol_if_the_vocabulary_has_one(text, other):
    vocab = Vocab.from_chars(text, unknown=True)
    assert vocab.decode(vocab.encode(text + other)) == "".join(c if c in vocab.symbols else UNKNOWN for c in text + other)


def counts_of(*texts):
    counts = np.zeros(NUM_CODE_POINTS, np.int64)
    for text in texts:
        found = count_code_points(text)
        counts[: len(found)] += found
    return counts


@given(st.lists(st.one_of(TEXTS, st.text(st.characters(max_codepoint=127)))))
def test_count_code_points_counts_every_character(texts):
    counts = counts_of(*texts)
    assert {chr(i): int(counts[i]) for i in np.flatnonzero(counts)} == dict(Counter("".join(texts)))


@given(TEXTS.filter(bool), st.integers(1, 8))
def test_max_symbols_keeps_the_most_frequent_symbols(text, most):
    vocab = Vocab.from_counts(counts_of(text), max_symbols=most)
    ranked = sorted(Counter(text).items(), key=lambda item: (-item[1], item[0]))
    assert set(vocab.symbols) == {symbol for symbol, _ in ranked[:most]} | {UNKNOWN}
    assert vocab.decode(vocab.encode(text)) == "".join(c if c in vocab.symbols else UNKNOWN for c in text)
    assert Vocab.from_counts(counts_of(text)) == Vocab.from_chars(text)


@given(TEXTS.filter(bool), TEXTS)
def test_num_chars_counts_characters_in_both_kinds_of_vocabulary(text, other):
    for vocab in (Vocab.from_chars(text + other), Vocab.all_bytes()):
        assert vocab.num_chars(vocab.encode(text)) == len(text)


@given(TEXTS.filter(bool))
def test_json_round_trip(text):
    for vocab in (Vocab.from_chars(text), Vocab.from_chars(text, unknown=True), Vocab.all_bytes()):
        assert Vocab.from_json(vocab.to_json()) == vocab


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        {},
        {"kind": "words"},
        {"kind": "chars"},
        {"kind": "chars", "symbols": "ba"},
        {"kind": "chars", "symbols": ""},
        {"kind": "chars", "symbols": "ab", "unknown": True},
        {"kind": "chars", "symbols": "ab", "unknown": 1},
    ],
)
def test_from_json_refuses_anything_that_is_not_a_vocabulary(value):
    with pytest.raises(ValueError):
        Vocab.from_json(value)
