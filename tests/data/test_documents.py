"""Documents: how a text is split, which part a document belongs to, and which windows the streams read."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from charlm.config import default_config
from charlm.data import corpus
from charlm.data.batching import cut_windows, device_windows, make_layout, prefetched_windows
from charlm.data.documents import Documents, document_positions, part_of
from charlm.data.vocab import Vocab
from charlm.system.errors import CorpusError

FRACTIONS = (0.7, 0.2, 0.1)


def data(**changes):
    config = default_config().data
    config.update(changes)
    return config


def documents_of(separator):
    return Documents.from_config(data(documents=separator))


def layout_of(boundaries, batch_size, seq_len, seed=0, shuffle=True):
    batching = default_config().batching
    batching.update(batch_size=batch_size, seq_len=seq_len, shuffle=shuffle)
    return make_layout(batching, seed, int(boundaries[-1]) + 1, boundaries)


@given(
    st.lists(st.text(alphabet="ab|\n-", max_size=9), max_size=30),
    st.sampled_from(["lines", "|", "\n\n", "--", "a|b"]),
    st.lists(st.integers(1, 5), min_size=1, max_size=5),
)
def test_any_pieces_of_a_text_give_its_documents(texts, separator, sizes):
    documents = documents_of(separator)
    text = documents.separator.join(texts)
    sizes, pieces, at = itertools.cycle(sizes), [], 0
    while at < len(text):
        pieces.append(text[at : at + (size := next(sizes))])
        at += size
    *first, last = text.split(documents.separator)
    assert list(documents.split(pieces)) == [each for each in [*first, last.removesuffix("\n")] if each]


@given(st.lists(st.text(alphabet="abcdef", min_size=1, max_size=6), min_size=1, max_size=60), st.data())
def test_a_document_keeps_its_part_when_others_are_added(names, draw):
    added = draw.draw(st.permutations([*names, "new", "newer"]))
    documents = documents_of("lines")

    def parts(names):
        found = ["", "", ""]
        for part, piece in documents.split_into_parts([["\n".join(names)]], FRACTIONS):
            found[part] += piece
        return [list(documents.split([each])) for each in found]

    before, after = parts(names), parts(added)
    assert sum(before, []) != [] and sorted(sum(after, [])) == sorted(added)
    for part in range(3):
        assert set(before[part]) <= set(after[part])
        assert all(part_of(name, FRACTIONS) == part for name in after[part])


def test_the_fractions_are_met_and_a_part_of_nothing_is_empty():
    names = [f"name {i}" for i in range(10_000)]
    shares = np.bincount([part_of(name, FRACTIONS) for name in names], minlength=3) / len(names)
    assert np.abs(shares - FRACTIONS).max() < 0.02
    assert {part_of(name, (1 / 3, 2 / 3 - 1e-7, 0.0)) for name in names} == {0, 1}


@pytest.mark.parametrize("vocab", ["chars", "bytes"])
@pytest.mark.parametrize("separator, boundary", [("lines", "\n"), ("|", "|"), ("<end>", "\x1e"), ("é", "\x1e")])
def test_the_encoded_parts_hold_every_document_once(tmp_path, vocab, separator, boundary):
    names = [f"Ann{i} née" if separator != "é" else f"Bob{i}" for i in range(200)]
    for name, some in (("a.txt", names[:120]), ("b.txt", names[120:])):
        text = ("\n" if separator == "lines" else separator).join(["", *some, "", ""]) + ("\r\n" if name == "a.txt" else "")
        (tmp_path / name).write_text(text, encoding="utf-8")
    loaded = corpus.load_corpus(data(path=str(tmp_path), documents=separator, vocab=vocab, split=FRACTIONS))
    found = []
    for ids in (loaded.train, loaded.val, loaded.test):
        text = loaded.vocab.decode(ids)
        assert text[0] == text[-1] == boundary and loaded.vocab.symbols[loaded.boundary] == boundary
        assert loaded.vocab.decode(ids[document_positions(ids, loaded.boundary)]) == boundary * text.count(boundary)
        found += text[1:-1].split(boundary)
    assert sorted(found) == sorted(names)
    same = corpus.encode_file(tmp_path / "b.txt", loaded.vocab, False, documents_of(separator))
    assert loaded.vocab.decode(same) == boundary + boundary.join(names[120:]) + boundary


def test_the_boundary_is_in_every_vocabulary_and_in_no_document(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("aaa bbb<>" * 9, encoding="utf-8")
    loaded = corpus.load_corpus(data(path=str(path), documents="<>", max_symbols=2))
    assert "\x1e" in loaded.vocab.symbols and loaded.vocab.unknown
    with pytest.raises(CorpusError, match="lacks '\\\\n', the boundary"):
        documents_of("lines").boundary_id(Vocab.from_chars("ab"))
    path.write_text("a\x1eb<>c", encoding="utf-8")
    with pytest.raises(CorpusError, match="'\\\\x1e', which marks the boundaries"):
        corpus.load_corpus(data(path=str(path), documents="<>"))
    path.write_text("\n\n\n", encoding="utf-8")
    with pytest.raises(CorpusError, match="is empty"):
        corpus.load_corpus(data(path=str(path), documents="lines"))


def test_without_documents_the_cached_corpus_is_that_of_earlier_versions(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("one\ntwo\nthree\n" * 9, encoding="utf-8")
    plain, split = (corpus.load_corpus(data(path=str(path), documents=value)) for value in ("", "lines"))
    assert plain.boundary is None and plain.vocab.decode(plain.train) + plain.vocab.decode(plain.val) == path.read_text()
    assert split.boundary == 0 and len(split.train) + len(split.val) == len(plain.train) + len(plain.val) + 1 + bool(
        len(split.val)
    )


# Sizes with the boundary, so that a document has at least one character.
SIZES = st.lists(st.integers(2, 12), min_size=1, max_size=40)


@given(SIZES, st.integers(1, 5), st.integers(1, 7), st.integers(0, 3), st.booleans())
@settings(max_examples=60)
def test_every_stream_reads_whole_documents_and_every_epoch_has_each_once(sizes, batch_size, seq_len, seed, shuffle):
    boundaries = np.cumsum([0, *sizes])
    if boundaries[-1] < batch_size * seq_len:
        with pytest.raises(CorpusError, match="fewer than one batch"):
            layout_of(boundaries, batch_size, seq_len, seed, shuffle)
        return
    layout = layout_of(boundaries, batch_size, seq_len, seed, shuffle)
    # Steps in any order give the same windows, so a resumed run reads what a whole one reads.
    num_steps = int(6 * layout.steps_per_epoch) + 1
    windows = {step: layout.batch(step) for step in reversed(range(num_steps))}
    again = layout_of(boundaries, batch_size, seq_len, seed, shuffle)
    assert all((again.batch(step).starts_B == windows[step].starts_B).all() for step in range(num_steps))
    assert not any(batch.reset_B.any() for batch in windows.values())
    # The last symbol of a window is the first one of the next.
    for step in range(num_steps - 1):
        assert (windows[step].starts_B[:, -1] == windows[step + 1].starts_B[:, 0]).all()
    streams = np.concatenate([windows[step].starts_B[:, :-1] for step in range(num_steps)], axis=1)
    times = np.zeros(len(sizes), int)
    for stream in streams:
        at = 0
        while at < len(stream):  # Each document is read from its first symbol to its last.
            document = int(np.flatnonzero(boundaries == stream[at])[0])
            part = stream[at : at + sizes[document]]
            assert (part == stream[at] + np.arange(len(part))).all()
            times[document] += at + sizes[document] <= len(stream)
            at += sizes[document]
    # The streams are in different epochs by at most their differences in size; no document is ahead by more.
    assert times.max() - times.min() <= 2 + batch_size * max(sizes) * 6 // boundaries[-1] + batch_size


def test_the_epochs_have_different_orders_and_the_streams_stay_together():
    rng = np.random.default_rng(0)
    boundaries = np.concatenate([[0], np.cumsum(rng.integers(3, 15, 4000))])
    layout = layout_of(boundaries, 8, 16)
    per_epoch = int(layout.steps_per_epoch)
    times = np.zeros(4000, int)
    first, epochs = [], 5
    starts = set(boundaries[:-1].tolist())
    index = {start: i for i, start in enumerate(boundaries[:-1].tolist())}
    for step in range(epochs * per_epoch):
        at_BW = layout.batch(step).starts_B
        for at in at_BW[:, :-1].ravel().tolist():
            if at in starts:
                times[index[at]] += 1
        if step % per_epoch == 3:
            first.append(at_BW.tobytes())
    assert len(set(first)) == epochs
    # All documents were read `epochs` times, but for those of the last windows.
    assert (times == epochs).mean() > 0.97 and times.min() >= epochs - 1 and times.max() <= epochs + 1
    assert layout_of(boundaries, 8, 16, seed=1).batch(0).starts_B.tobytes() != layout.batch(0).starts_B.tobytes()


@given(first=st.integers(0, 40), sizes=st.lists(st.integers(1, 8), min_size=1, max_size=3))
@settings(max_examples=4)
def test_both_window_sources_return_the_same_windows(first, sizes):
    rng = np.random.default_rng(0)
    boundaries = np.concatenate([[0], np.cumsum(rng.integers(2, 9, 60))])
    text = rng.integers(0, 300, boundaries[-1] + 1).astype(np.uint16)
    layout = layout_of(boundaries, 3, 5)
    sources = device_windows(text, layout, 8), prefetched_windows(text, layout, 8, first, first + sum(sizes))
    step = first
    for n in sizes:
        found = []
        for source in sources:
            ids_N, starts_KB, reset_KB = source.take(step, n)
            assert starts_KB.shape == (8, 3, 6) and not reset_KB.any()
            found.append([np.asarray(cut_windows(jnp.asarray(ids_N), starts_KB[k], 5)) for k in range(n)])
        expected = [text[layout.batch(step + k).starts_B] for k in range(n)]
        assert np.array_equal(found[0], expected) and np.array_equal(found[1], expected)
        step += n
    sources[1].close()
