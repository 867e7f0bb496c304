import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from charlm.errors import CorpusError
from charlm.vocab import Vocab

TEXTS = st.text(st.characters(codec="utf-8"))


@given(TEXTS.filter(bool))
def test_chars_round_trip(text):
    vocab = Vocab.of_chars(set(text))
    ids = vocab.encode(text)
    assert vocab.decode(ids) == text
    assert ids.dtype == vocab.dtype
    assert sorted(set(ids.tolist())) == list(range(vocab.size))


@given(TEXTS)
def test_bytes_round_trip(text):
    vocab = Vocab.of_bytes()
    assert vocab.encode(text).tobytes() == text.encode()
    assert vocab.decode(vocab.encode(text)) == text


@given(TEXTS, st.integers(1, 5))
def test_a_byte_stream_in_pieces_never_shows_half_a_character(text, size):
    vocab = Vocab.of_bytes()
    ids, decode = vocab.encode(text), vocab.decoder()
    pieces = [decode(ids[i : i + size]) for i in range(0, len(ids), size)] + [decode(ids[:0], True)]
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


@pytest.mark.parametrize("size, dtype", [(256, np.uint8), (257, np.uint16), (1 << 16, np.uint16), ((1 << 16) + 1, np.uint32)])
def test_ids_are_as_narrow_as_can_be(size, dtype):
    points = [p for p in range(size + 3000) if not 0xD800 <= p < 0xE000][:size]
    vocab = Vocab.of_chars(map(chr, points))
    assert vocab.dtype == dtype
    assert vocab.encode(vocab.symbols).tolist() == list(range(size))


@given(TEXTS.filter(bool), st.characters(codec="utf-8"), st.integers(0, 1000))
def test_an_unknown_symbol_is_named_with_its_position(text, other, position):
    vocab = Vocab.of_chars(set(text) - {other} or {"a" if other != "a" else "b"})
    known = "".join(c for c in text if c in vocab.symbols)
    with pytest.raises(CorpusError) as error:
        vocab.encode(known + other, position)
    assert f"symbol {other!r} at position {position + len(known)} " in str(error.value)


@given(TEXTS.filter(bool))
def test_json_round_trip(text):
    for vocab in (Vocab.of_chars(set(text)), Vocab.of_bytes()):
        assert Vocab.from_json(vocab.to_json()) == vocab


@pytest.mark.parametrize(
    "value",
    [None, [], {}, {"kind": "words"}, {"kind": "chars"}, {"kind": "chars", "symbols": "ba"}, {"kind": "chars", "symbols": ""}],
)
def test_what_is_no_vocabulary_is_refused(value):
    with pytest.raises(ValueError):
        Vocab.from_json(value)
