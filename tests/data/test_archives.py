"""Texts in archives: the same text as in a plain file, or one line that says what is wrong with the archive."""

import bz2
import gzip
import io
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from charlm.config import default_config
from charlm.data import archives, corpus, text
from charlm.system.cache import cache_dir
from charlm.system.errors import CorpusError

TEXT = "Ein Text, größer als nichts: 漢字\r\nand a line\n" * 8
KINDS = ("zip", "gz", "bz2")


def data(path, **changes):
    options = default_config().data
    options.update(path=str(path), **changes)
    return options


def load(path, **changes):
    loaded = corpus.load_corpus(data(path, **changes))
    return [loaded.vocab.decode(part) for part in (loaded.train, loaded.val, loaded.test)]


def zipped(members, **changes):
    """A zip archive of {name or ZipInfo: bytes}, as bytes."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content, **changes)
    return file.getvalue()


def packed(kind, content):
    return zipped({"a.txt": content}) if kind == "zip" else {"gz": gzip, "bz2": bz2}[kind].compress(content)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A cache of each test's own, and a folder for its archives that must hold nothing else afterwards."""
    monkeypatch.setenv("CHARLM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    yield tmp_path / "in"
    assert {path.name for path in tmp_path.iterdir()} <= {"in", "cache"}


def left():
    """The files in this folder and in the cache, without locks."""
    return {path for folder in (Path(), cache_dir()) for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"}


def refused(name, content, match, **changes):
    """Check that a file is refused in one line, and that nothing is left of it."""
    with open(name, "wb") as file:
        file.write(content)
    before = left()
    with pytest.raises(CorpusError, match=match) as error:
        load(changes.pop("path", name), **changes)
    assert "\n" not in str(error.value) and name in str(error.value)
    assert left() == before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("piece_bytes", [7, 1 << 22])
def test_an_archive_holds_the_same_text_as_a_file(folder, monkeypatch, kind, piece_bytes):
    monkeypatch.setattr(text, "PIECE_BYTES", piece_bytes)
    (folder / "plain.txt").write_bytes(TEXT.encode())
    (folder / f"text.{kind}").write_bytes(packed(kind, TEXT.encode()))
    (folder / "no_suffix").write_bytes(packed(kind, TEXT.encode()))
    assert load(f"text.{kind}") == load("no_suffix") == load("plain.txt")
    ids = corpus.encode_file(folder / f"text.{kind}", corpus.load_corpus(data("plain.txt")).vocab, False)
    assert len(ids) == len(text.normalise(TEXT, False))


@pytest.mark.parametrize("documents", ["", "lines"])
def test_an_archive_is_expanded_once(folder, monkeypatch, documents):
    (folder / "text.zip").write_bytes(packed("zip", TEXT.encode()))
    open_text, opened = text.open_text, []
    monkeypatch.setattr(text, "open_text", lambda *args: opened.append(args) or open_text(*args))
    load("text.zip", documents=documents)
    assert len(opened) == 1


@pytest.mark.parametrize("kind", ["gz", "bz2"])
def test_an_archive_may_have_several_streams(folder, kind):
    (folder / "text").write_bytes(packed(kind, b"one ") + packed(kind, b"") + packed(kind, b"two and three"))
    assert "".join(load("text")) == "one two and three"
    refused("more", packed(kind, TEXT.encode()) + b"what is this", "is a damaged or incomplete archive")


def test_an_archive_is_read_like_a_folder(folder):
    names = ("b.txt", "a/z.txt", "b/a.txt", ".hidden", "__MACOSX/._b.txt", "b-c.md")
    (folder / "books.zip").write_bytes(zipped({name: name.encode() for name in names} | {"empty/": b""}))
    whole = "a/z.txt|b/a.txt|b-c.md|b.txt"
    assert "".join(load("books.zip", separator="|")) == whole
    assert "".join(load("books.zip#*.txt", separator="|")) == "a/z.txt|b/a.txt|b.txt"
    assert "".join(load("books.zip#b/a.txt")) == "b/a.txt"
    assert "".join(load("*.zip#.hidden")) == ".hidden"
    (folder / "plain.txt").write_text("plain")
    assert "".join(load(".", separator="|")) == f"{whole}|plain"
    with pytest.raises(CorpusError, match=r"books.zip has no member 'c.txt'; it has b.txt, a/z.txt, b/a.txt, .hidden, __"):
        load("books.zip#c.txt")
    with pytest.raises(CorpusError, match="plain.txt is not a zip file, so it has no member 'a'"):
        load("plain.txt#a")
    (folder / "notes#1").mkdir()
    (folder / "notes#1" / "c#.txt").write_text("a name with a number sign")
    assert load("notes#1/c#.txt") == load("notes#1/*#.txt") == load("notes#1")


def test_the_members_of_an_archive_can_be_the_three_parts(folder):
    (folder / "parts.zip").write_bytes(zipped({"p/train.txt": b"abc" * 9, "p/valid.txt": b"cab", "p/test.txt": b"bca!"}))
    parts = {"val_path": "#*/valid.txt", "test_path": "parts.zip#p/test.txt"}
    assert load("parts.zip#p/train.txt", **parts) == ["abc" * 9, "cab", "bca!"]
    with pytest.raises(CorpusError, match="parts.zip#p/valid.txt belongs to two of data.path, data.val_path"):
        load("parts.zip", val_path="#p/valid.txt")


@pytest.mark.parametrize("kind", KINDS)
def test_an_archive_that_is_cut_short_is_refused(kind, monkeypatch):
    content = packed(kind, "größer\n".encode() * 3)
    for end in range(len(content)):
        refused(f"text.{kind}", content[:end], "is not a .* file, although its name|is a damaged or incomplete archive")


@pytest.mark.fuzz
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(kind=st.sampled_from(KINDS), draw=st.data())
def test_an_altered_archive_gives_its_text_or_an_error(folder, kind, draw):
    content = bytearray(packed(kind, TEXT.encode()))
    content[draw.draw(st.integers(0, len(content) - 1))] ^= draw.draw(st.integers(1, 255))
    (folder / "text").write_bytes(content)
    try:
        found = "".join(piece for each in archives.find_texts(folder / "text") for piece in text.read_pieces(each, False))
    except CorpusError as error:
        assert "\n" not in str(error)
    else:
        assert found == text.normalise(TEXT, False)


@pytest.mark.parametrize(
    "name", ["../a.txt", "/a.txt", "b/../../a.txt", "..\\a.txt", "C:\\a.txt", "C:a.txt", "\\\\host\\a.txt"]
)
def test_a_name_that_leads_out_of_the_archive_is_refused(name):
    refused("text.zip", zipped({"good.txt": b"good", name: b"bad"}), "which leads out of the archive; extract the text")


@pytest.mark.parametrize("mode", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR])
def test_a_link_or_a_device_in_an_archive_is_refused(mode):
    info = zipfile.ZipInfo("link.txt")
    info.external_attr = (mode | 0o777) << 16
    refused("text.zip", zipped({"good.txt": b"good", info: b"/etc/passwd"}), "'link.txt', a link or a device")


def test_members_that_cannot_be_read_safely_are_refused():
    refused("text.zip", zipped({"a.txt": TEXT}, compress_type=zipfile.ZIP_BZIP2), "is compressed by bzip2, not by deflate")
    refused("text.zip", zipped({"a.txt": TEXT}, compress_type=zipfile.ZIP_LZMA), "is compressed by lzma, not by deflate")
    refused("text.zip", zipped({}), "text.zip has no file")
    with pytest.warns(UserWarning, match="Duplicate name"):
        twice = io.BytesIO(zipped({"a.txt": "a"}))
        with zipfile.ZipFile(twice, "a") as archive:
            archive.writestr("a.txt", "b")
    refused("text.zip", twice.getvalue(), "has the member 'a.txt' twice")
    encrypted = bytearray(zipped({"a.txt": TEXT}))
    encrypted[encrypted.index(b"PK\x01\x02") + 8] |= 1
    refused("text.zip", bytes(encrypted), "the member 'a.txt' is encrypted")


def test_an_archive_that_expands_without_limit_is_refused(monkeypatch):
    monkeypatch.setattr(archives, "_ALWAYS_ALLOWED_BYTES", 1 << 16)
    for kind in KINDS:
        refused(f"bomb.{kind}", packed(kind, b"a" * (1 << 22)), "expands to more than 200 times its size; if this is intended")
    # A member whose size is a lie.
    lie = bytearray(zipped({"a.txt": b"a" * (1 << 22)}))
    for magic, at in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        position = lie.index(magic) + at
        lie[position : position + 4] = (1000).to_bytes(4, "little")
    refused("lie.zip", bytes(lie), "is a damaged or incomplete archive: Bad CRC-32")


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "tar.bz2"])
def test_a_tar_archive_is_refused(suffix):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=f"w:{suffix[4:]}") as archive:
        archive.addfile(info := tarfile.TarInfo("a.txt"), io.BytesIO(TEXT.encode()[: info.size]))
    refused(f"text.{suffix}", file.getvalue(), "is a tar archive; extract the text from it")


def test_the_command_refuses_a_hostile_archive_in_one_line(run, small_config, folder):
    bomb, cut = packed("zip", b"a" * (1 << 26) + b"a"), packed("gz", TEXT.encode())[:-9]
    for name, content in (("bomb.zip", bomb), ("cut.gz", cut), ("names.zip", zipped({"../a.txt": b"bad"}))):
        (folder / name).write_bytes(content)
        before = left()
        code, out, err = run("train", f"--config={small_config}", f"--config.data.path={name}", "--workdir=run")
        assert code == 2 and out == "" and err.count("\n") == 1 and name in err and left() == before


def test_text_in_an_archive_must_be_utf_8():
    refused("text.zip", zipped({"a.txt": b"abc\xff"}), r"text.zip#a.txt is not UTF-8: byte 0xff at byte offset 3")
