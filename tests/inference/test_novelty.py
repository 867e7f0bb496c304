"""The copy check: it finds what a plain search finds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from charlm.data.vocab import Vocab
from charlm.inference import novelty


def longest_by_search(sample: str, text: str) -> tuple[int, int]:
    """Return (start, length) of the longest run, the first one of several."""
    runs = [(start, length) for length in range(len(sample), 0, -1) for start in range(len(sample) - length + 1)]
    return next((run for run in runs if sample[run[0] : run[0] + run[1]] in text), (0, 0))


@given(st.text("ab", max_size=60), st.lists(st.text("abc", max_size=12), min_size=1, max_size=5), st.integers(1, 70))
@settings(max_examples=200)
def test_it_finds_what_a_plain_search_finds(text, samples, block):
    vocab = Vocab.from_chars("abc")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(novelty, "_BLOCK", block)
        ids = [vocab.encode(sample) for sample in samples]
        copies = novelty.longest_copies(ids, vocab.encode(text))
        known = novelty.contains(ids, vocab.encode(text))
    assert known == [sample in text for sample in samples]
    for sample, copy in zip(samples, copies):
        assert copy.length == longest_by_search(sample, text)[1]
        assert sample[copy.start : copy.start + copy.length] in text


def test_long_copies_are_found_in_a_long_text():
    text = np.random.default_rng(0).integers(0, 300, 200_000).astype(np.uint16)
    other = np.full(400, 301, np.uint16)
    mixed = np.concatenate([other[:50], text[123_400:123_777], other[:9]])
    assert novelty.longest_copies([text[70_000:71_000], mixed, other], text) == [(0, 1000), (50, 377), (0, 0)]


def test_two_runs_with_the_same_hash_are_told_apart(monkeypatch):
    monkeypatch.setattr(novelty, "_BASE", 1)
    monkeypatch.setattr(novelty, "_INVERSE", 1)
    vocab = Vocab.from_chars("abc")  # With base 1 the hash is a sum, so the order of the symbols does not count.
    assert novelty.contains([vocab.encode("ab"), vocab.encode("ba")], vocab.encode("cccba")) == [False, True]


def test_a_document_is_known_only_as_a_whole():
    vocab = Vocab.from_chars("\nabn")
    found = novelty.describe_novelty(["ann", "anna", ""], vocab, vocab.encode("\nanna\nban\n"), 0)
    assert [each["in_training_text"] for each in found["samples"]] == [False, True, False]
    assert [each["copy"] for each in found["samples"]] == ["ann", "anna", ""] and found["new"] == 2 / 3
    found = novelty.describe_novelty(["ann", "nna", "ba"], vocab, vocab.encode("\nanna\nban\n"), 0, [True, True, False])
    assert [each["in_training_text"] for each in found["samples"]] == [True, False, False]  # The first two were cut.
    assert novelty.describe_novelty(["nba"], vocab, vocab.encode("\nanna\nban\n"))["samples"][0]["longest_copy"] == 2


def test_a_run_of_bytes_is_reported_in_whole_characters():
    vocab = Vocab.all_bytes()
    (found,) = novelty.describe_novelty(["xéy"], vocab, vocab.encode("aéyè"))["samples"]
    assert found["copy"] == "éy" and found["longest_copy"] == 2
    (found,) = novelty.describe_novelty(["à"], vocab, vocab.encode("é"))["samples"]
    assert found["copy"] == "" and not found["in_training_text"]
