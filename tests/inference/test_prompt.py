import pytest
from hypothesis import given
from hypothesis import strategies as st

from charlm.config import default_config
from charlm.data.vocab import Vocab
from charlm.inference.prompt import make_prompt
from charlm.system.errors import ConfigError


def options_of(**sample):
    config = default_config().unlock()
    config.sample.update(sample)
    return config


@given(st.integers(1, 30), st.integers(0, 50), st.booleans())
def test_a_random_prompt_is_part_of_the_text(length, seed, as_bytes):
    text = "aé漢🙂b\nc" * 20
    vocab = Vocab.all_bytes() if as_bytes else Vocab.from_chars(text)
    prompt, ids = make_prompt(options_of(random_prompt=length), vocab, vocab.encode(text), seed)
    assert prompt in text and length <= len(ids) <= length + (3 if as_bytes else 0)
    # A prompt of bytes consists of whole characters, so the sample starts with a whole character.
    assert (vocab.encode(prompt) == ids).all()
    assert (ids == make_prompt(options_of(random_prompt=length), vocab, vocab.encode(text), seed)[1]).all()


def test_prompts_that_are_too_short_or_too_long_are_refused():
    vocab = Vocab.from_chars("abc")
    with pytest.raises(ConfigError, match="sample.window is 5, but the prompt has 3 symbols; give a longer one, or set"):
        make_prompt(options_of(window=5, prompt="abc"), vocab, None, 0)
    with pytest.raises(ConfigError, match="sample.random_prompt is 9, but the training text has 8 symbols"):
        make_prompt(options_of(random_prompt=9), vocab, vocab.encode("abcabcab"), 0)
