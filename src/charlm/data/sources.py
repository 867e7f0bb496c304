"""Sources of texts: what `config.data` names, before it is read. A source can be read several times, in pieces."""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from charlm.data import text as texts
from charlm.data.archives import File, find_texts, split_member
from charlm.data.documents import Documents
from charlm.data.download import fetch
from charlm.system.cache import cache_dir
from charlm.system.errors import CorpusError
from charlm.system.progress import ByteProgress

# As in nanoGPT, the last tenth is for validation.
FILE_SPLIT = (0.9, 0.1, 0.0)
# The training, validation and test parts: fractions of a text, or numbers of symbols.
Split = tuple[float, float, float]
# Called with the number of bytes of every read.
Advance = Callable[[int], None]
# Returns a text from its beginning, in pieces.
Pieces = Callable[[Advance], Iterable[str]]
# Returns the files of a text, each in pieces.
Files = Callable[[Advance], Iterable[Iterable[str]]]
# Returns (index of the part, piece) for all documents of a source, from the beginning.
Parts = Callable[[Advance], Iterable[tuple[int, str]]]


class Source(NamedTuple):
    """A text that is not read yet, with all that identifies it in the cache.

    Attributes:
        name: the name in messages.
        texts: the text, and the texts for validation and for test if they are separate. The first one is split.
        split: the fractions or the numbers of symbols of the first text that are for training, validation and test.
        files: the files of the texts. Without files, the texts themselves identify the source.
        separator: the text between two files.
        options: a JSON value, what the texts depend on besides the files and the separator; None: nothing.
        sha256: the value of `Corpus.sha256`; None: the fingerprint.
        documents: the documents of all texts, with the part of each; None: the texts have no documents.
    """

    name: str
    texts: tuple[Pieces, Pieces | None, Pieces | None]
    split: Split
    files: Sequence[Path] = ()
    separator: str = ""
    options: Any = None
    sha256: str | None = None
    documents: Parts | None = None

    def read(self, advance: Advance) -> Iterator[tuple[int, str]]:
        """Yield (index of the text, piece), text by text; for documents (index of the part, piece), and the parts alternate."""
        if self.documents is not None:
            yield from self.documents(advance)
            return
        for i, pieces in enumerate(self.texts):
            for piece in pieces(advance) if pieces else ():
                yield i, piece

    def num_bytes(self) -> int | None:
        """Return the size of the files in bytes; None without files."""
        return sum(path.stat().st_size for path in self.files if path.exists()) or None

    def identity(self) -> str:
        """Return what the fingerprint depends on besides the files."""
        return self.separator if self.options is None else json.dumps([self.separator, self.options])

    def fingerprint(self) -> str:
        """Return a sha256 of all that identifies the source. Reads all files, or all texts."""
        with ByteProgress(f"checking {self.name}", self.num_bytes()) as progress:
            if not self.files:
                hashes = [each and _text_sha256(each) for each in self.texts]
                return hashes[0] if not any(hashes[1:]) else _json_sha256(hashes)
            found = texts.files_sha256(self.files, self.separator, progress.advance)
        return found if self.options is None else _json_sha256([found, self.options])


def _json_sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _text_sha256(pieces: Pieces) -> str:
    """Return the sha256 of a text in UTF-8."""
    digest = hashlib.sha256()
    for piece in pieces(lambda size: None):
        digest.update(piece.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def counts_symbols(split: Split) -> bool:
    """Return whether a split holds numbers of symbols, and not fractions. (1, 0, 0) holds fractions."""
    return all(isinstance(part, int) for part in split) and sum(split) > 1


def part_lengths(total: int, split: Split, name: str) -> tuple[int, int, int]:
    """Return the lengths of the training, validation and test parts of a text of length `total`.

    The boundaries of fractions are rounded down, as in nanoGPT. Numbers are the lengths; the text may be longer.

    Raises:
        CorpusError: the text is shorter than the numbers together.
    """
    if counts_symbols(split):
        if sum(split) > total:
            raise CorpusError(f"data.split {tuple(split)} needs {sum(split):,} symbols, but {name} has {total:,}")
        return tuple(split)
    train_end = int(total * split[0] + 1e-9)
    val_end = int(total * (split[0] + split[1]) + 1e-9)
    return train_end, val_end - train_end, total - val_end


def cut(text: str, split: Split, name: str) -> list[str]:
    """Return the training, validation and test parts of a text."""
    ends = list(itertools.accumulate(part_lengths(len(text), split, name)))
    return [text[: ends[0]], text[ends[0] : ends[1]], text[ends[1] : ends[2]]]


def path_source(data: ConfigDict) -> Source:
    """Return the source that `data.path` names."""
    path, member = split_member(data.path)
    return _files_source(data, data.path, texts.find_files(path), member, FILE_SPLIT)


def url_source(data: ConfigDict, name: str, url: str, sha256: str, split: Split = FILE_SPLIT) -> Source:
    """Return the source of a file that is downloaded once.

    Args:
        data: `config.data`.
        name: the name in messages.
        url: the URL. What follows a `#` names members of an archive.
        sha256: the sha256 of the file.
        split: the split if `data.split` is unset.
    """
    address, _, member = url.partition("#")
    return _files_source(data, name, [fetch(address, sha256, cache_dir() / "downloads")], member or None, split)


def _files_source(data: ConfigDict, name: str, files: list[Path], member: str | None, default: Split) -> Source:
    parts = [(files, member), _part_files(data, "val_path", files), _part_files(data, "test_path", files)]
    given = [part for part in parts if part]
    for one, other in itertools.combinations(given, 2):
        if common := _common_text(*one, *other):
            raise CorpusError(f"{common} belongs to two of data.path, data.val_path and data.test_path; separate the texts")
    split = (1.0, 0.0, 0.0) if parts[1] else default
    if data.split is not None:
        split = tuple(data.split)
    as_bytes = data.vocab == "bytes" and counts_symbols(split)

    def pieces(files: list[Path], member: str | None) -> Pieces:
        return lambda advance: texts.read_files(files, data.separator, data.lowercase, advance, member, as_bytes)

    def each(files: list[Path], member: str | None) -> Files:
        return lambda advance: texts.read_each(files, data.lowercase, advance, member)

    return Source(
        name,
        tuple(part and pieces(*part) for part in parts),
        split,
        [file for part in given for file in part[0]],
        data.separator,
        None if len(given) == 1 and member is None else [part and [len(part[0]), part[1]] for part in parts],
        documents=document_parts(data, [part and each(*part) for part in parts], split),
    )


def document_parts(data: ConfigDict, texts: Sequence[Files | None], split: Split) -> Parts | None:
    """Return the documents of a text, and of the texts for validation and for test; None without `data.documents`.

    Args:
        data: `config.data`.
        texts: the files of the three texts; None: there is no such text.
        split: the fractions of the documents of the first text that are for training, validation and test.
    """
    documents = Documents.from_config(data)
    if documents is None:
        return None

    def parts(advance: Advance) -> Iterator[tuple[int, str]]:
        for i, files in enumerate(texts):
            if files is not None:
                fractions = split if i == 0 else tuple(float(part == i) for part in range(3))
                yield from documents.split_into_parts(files(advance), fractions)

    return parts


def _part_files(data: ConfigDict, key: str, files: list[Path]) -> tuple[list[Path], str | None] | None:
    """Return (files, member) of the text for validation or test; None if it has no files of its own."""
    path = data[key]
    if path is None:
        return None
    if path.startswith("#"):  # Members of the archive that holds the training text.
        return files, path[1:]
    path, member = split_member(path)
    return texts.find_files(path, f"data.{key}"), member


def _common_text(files: list[Path], member: str | None, others: list[Path], other_member: str | None) -> File | None:
    """Return a text that belongs to both of two parts; None if there is none."""
    named, other_named = ({texts.file_identity(path): path for path in each} for each in (files, others))
    for identity in named.keys() & other_named.keys():
        path = named[identity]
        common = set(find_texts(path, member)) & set(find_texts(path, other_member))
        if common:
            return min(common)
    return None


def verified(pieces: Pieces, sha256: str, name: str) -> Pieces:
    """Return the same text. After its last piece, raise CorpusError if the sha256 of the text is another one."""

    def read(advance: Advance) -> Iterator[str]:
        digest = hashlib.sha256()
        for piece in pieces(advance):
            digest.update(piece.encode("utf-8", "surrogateescape"))
            yield piece
        if (found := digest.hexdigest()) != sha256:
            raise CorpusError(f"the text of {name} has the sha256 {found}, not {sha256}: it is another version of the corpus")

    return read
