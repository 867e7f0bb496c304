import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from charlm.data import text
from charlm.system.errors import CorpusError


@given(
    st.text(st.sampled_from("ab\n\r éΣσ漢🙂")),
    st.integers(1, 9),
    st.booleans(),
    st.booleans(),
)
def test_the_pieces_of_a_file_make_up_the_file(tmp_path_factory, content, piece_bytes, lowercase, bom):
    path = tmp_path_factory.mktemp("t") / "t.txt"
    path.write_bytes((b"\xef\xbb\xbf" if bom else b"") + content.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "PIECE_BYTES", max(piece_bytes, 3))
        pieces = list(text.read_pieces(path, lowercase=False))
        lowered = "".join(text.read_pieces(path, lowercase=True))
    assert "".join(pieces) == text.normalise(content, lowercase=False)
    if len(content) < 12:  # No line of a short text is cut.
        assert lowered == text.normalise(content, lowercase=True)


@pytest.mark.parametrize("prefix", [b"", "añ漢".encode(), b"\xef\xbb\xbfabc"])
@pytest.mark.parametrize("bad", [b"\xff", b"\xc3(", b"\xe6\xbc"])
def test_invalid_utf_8_is_reported_with_its_byte_offset(tmp_path, monkeypatch, prefix, bad):
    monkeypatch.setattr(text, "PIECE_BYTES", 4)
    path = tmp_path / "bad.txt"
    path.write_bytes(prefix + bad)
    with pytest.raises(CorpusError, match=f"not UTF-8: byte 0x{bad[0]:02x} at byte offset {len(prefix)} "):
        list(text.read_pieces(path, lowercase=False))


def test_a_play_is_reduced_to_names_and_speeches():
    markdown = (
        "# Title\n\n## ACT I\n\n### SCENE I. A place.\n\n_Enter A and B,\nwith drums_\n\n**A**  \nOne _\\[Aside]_ two,  \n"
        "three.\n\n_Exit A_\n\n**First B**  \n\\--Four; _[To A]\nfive._ six\n\n*[Sings.]*\n\nseven\n\n**C**  \n_\\[Dies]_\n"
    )
    assert text.play_text(markdown) == "A:\nOne two,\nthree.\n\nFirst B:\n--Four; six\nseven\n"


def test_the_built_in_plays_are_clean_text_with_the_recorded_sha256():
    plays = [text.play_text(path.read_text(encoding="utf-8")) for path in text.play_paths()]
    whole = "".join(plays)
    assert len(plays) == 38 and hashlib.sha256(whole.encode()).hexdigest() == text.SHAKESPEARE_SHA256
    assert not set("[]_*#\\") & set(whole) and "\n\n\n" not in whole and "  " not in whole
    assert "HAMLET:\nTo be, or not to be: that is the question:\n" in whole
