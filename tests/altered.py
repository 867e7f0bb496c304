"""Strategies of hypothesis for altered files: JSON with other values, and bytes that were cut, flipped or inserted."""

import copy
import json

from hypothesis import settings
from hypothesis import strategies as st

# The number of examples of a property whose example takes long: a fifth in the fast tests, and all in the other profiles.
FEW = settings.default.max_examples // (5 if settings.default.max_examples == 100 else 1)

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(exclude_categories=[]), max_size=8)
    | st.sampled_from([1 << 31, -1, 1e400, "lstm", "\ud800", "../../x", "!!python/object"])
)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)


@st.composite
def altered_values(draw, value):
    """Draw a JSON value in which up to three entries were replaced, removed or added."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        place = value
        while isinstance(place, dict) and place:
            key = draw(st.sampled_from(sorted(place)))
            if isinstance(place[key], dict) and place[key] and draw(st.booleans()):
                place = place[key]
                continue
            what = draw(st.sampled_from(["replace", "remove", "add"]))
            if what == "remove":
                del place[key]
            else:
                place[key if what == "replace" else draw(st.text(max_size=5))] = draw(JSON)
            break
        else:
            return draw(JSON)
    return value


@st.composite
def altered_bytes(draw, content):
    """Draw bytes of which some were cut off, flipped or inserted."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(content)))
        what = draw(st.sampled_from(["cut", "flip", "insert", "deep"]))
        if what == "cut":
            del content[at:]
        elif what == "flip" and at < len(content):
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif what == "insert":
            content[at:at] = draw(st.binary(max_size=6))
        elif what == "deep":
            content[at:at] = b"[" * draw(st.sampled_from([10, 3000]))
    return bytes(content)


def altered(value):
    """Return a strategy for the bytes of an altered JSON file."""
    sound = json.dumps(value).encode()
    return altered_values(value).map(lambda each: json.dumps(each).encode()) | altered_bytes(sound)
