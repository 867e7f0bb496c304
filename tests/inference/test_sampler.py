import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from charlm.config import default_config
from charlm.data.vocab import Vocab
from charlm.inference.decoding import decode_samples
from charlm.inference.sampler import (
    Settings,
    filter_top_k_top_p,
    generate,
    make_sampler,
    sample_keys,
)
from charlm.nn.cells import CELLS
from charlm.nn.model import CharLM
from charlm.sample import write_samples

V = 10
PLAIN = Settings(1.0, V, 1.0, False)


def ravel(state):
    """Return all numbers of a state in one array."""
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(state)])


@pytest.fixture(scope="module")
def sampling():
    config = default_config().model
    config.update(hidden_size=16, embedding_size=6)
    model = CharLM.from_config(config, V)
    params = jax.tree.map(lambda p: 2 * np.asarray(p), jax.jit(model.initial_params)(jax.random.key(0)))
    vocab = Vocab.from_chars("abcdefghij")
    sampler = make_sampler(model, vocab)

    def draw(length, num_samples=1, seed=0, prompt=(3,), settings=PLAIN, keys=None):
        keys = sample_keys(seed, num_samples) if keys is None else keys
        pieces = generate(sampler, params, vocab, np.array(prompt), keys, length, settings)
        return np.concatenate(list(pieces), axis=1)

    return model, params, sampler, draw


@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
def test_a_sample_has_the_given_length_and_is_a_prefix_of_longer_ones(sampling, length):
    draw = sampling[3]
    text = draw(length, num_samples=2)
    assert text.shape == (2, length)
    assert (draw(300, num_samples=2)[:, :length] == text).all()


def test_samples_differ_between_seeds_and_are_repeatable(sampling):
    draw = sampling[3]
    a, b = draw(100, num_samples=3), draw(100, num_samples=3, seed=1)
    assert (a == draw(100, num_samples=3)).all()
    assert len({row.tobytes() for row in np.concatenate([a, b])}) == 6


def test_a_sample_does_not_depend_on_the_others_of_its_batch(sampling):
    draw = sampling[3]
    batch, keys = draw(150, num_samples=9), sample_keys(0, 9)
    for n in range(9):
        assert (draw(150, keys=keys[n : n + 1])[0] == batch[n]).all()


def test_temperature_seed_and_length_trigger_no_recompilation(sampling):
    _, _, sampler, draw = sampling
    draw(70, num_samples=4)
    compiled = sampler.block._cache_size()
    draw(70, num_samples=4, seed=5, settings=PLAIN._replace(temperature=0.3))
    draw(200, num_samples=4, prompt=(1, 2, 3), settings=PLAIN._replace(greedy=True))
    assert sampler.block._cache_size() == compiled


# A hand-written and an inherited derivative, and a cell that reads features.
KINDS_OF_CELL = ("lstm", "ln_gru", "mogrifier_lstm")


@pytest.mark.parametrize(
    "changes",
    [
        *(pytest.param({"cell": cell}, marks=() if cell in KINDS_OF_CELL else pytest.mark.slow) for cell in CELLS),
        {"num_layers": 2, "residual": True},
        {"boundary": 0},
        {"window": 5},
        {"bytes": True},
    ],
    ids=str,
)
def test_reading_a_prompt_gives_the_state_of_drawing_it(changes):
    is_bytes, boundary, window = (
        changes.pop(key, other) for key, other in (("bytes", False), ("boundary", None), ("window", 0))
    )
    config = default_config().model
    config.update(hidden_size=16, embedding_size=6, **changes)
    vocab = Vocab.all_bytes() if is_bytes else Vocab.from_chars("abcdefghij")
    model = CharLM.from_config(config, vocab.size, boundary)
    params = jax.jit(model.initial_params)(jax.random.key(0))
    sampler = make_sampler(model, vocab, window)
    weights, state = sampler.prepare(params), sampler.start(params, 2)
    ids_KN = np.random.default_rng(0).integers(0, vocab.size, (70, 2)).astype(np.int32)
    if is_bytes:
        ids_KN[:, 0] = list("漢🙂é".encode() * 8)[:70]
    keys_N, settings = sample_keys(0, 2), Settings(1.0, vocab.size, 1.0, False)
    drawn, *_ = sampler.block(weights, state, ids_KN[0], keys_N, 0, ids_KN[1:], 69, settings, filtered=False)
    # A cell without products may be rounded in another way.
    np.testing.assert_allclose(*map(ravel, (sampler.read(weights, state, ids_KN[:-1]), drawn)), rtol=1e-5, atol=1e-6)


def test_a_sample_does_not_depend_on_the_parts_in_which_a_prompt_is_read(sampling, monkeypatch):
    draw = sampling[3]
    prompt = np.random.default_rng(0).integers(0, V, 300)
    text = draw(100, num_samples=2, prompt=prompt)
    for size in (7, 149, 299, 300):
        monkeypatch.setattr("charlm.inference.sampler._READ", size)
        assert (draw(100, num_samples=2, prompt=prompt) == text).all()


@pytest.mark.parametrize("prompt_length", [1, 2, 64, 65, 130])
def test_a_sample_continues_from_the_state_after_the_prompt(sampling, prompt_length):
    model, params, _, draw = sampling
    prompt = np.random.default_rng(prompt_length).integers(0, V, prompt_length)
    greedy = draw(5, prompt=prompt, settings=PLAIN._replace(greedy=True))[0]
    apply = jax.jit(model.apply)
    logits, carry = apply({"params": params}, prompt[:, None], model.initial_carry(params, 1))
    expected = [int(np.argmax(logits[-1, 0]))]
    while len(expected) < 5:
        logits, carry = apply({"params": params}, np.array([[expected[-1]]]), carry)
        expected.append(int(np.argmax(logits[0, 0])))
    assert greedy.tolist() == expected


def test_symbols_are_drawn_with_the_probabilities_of_the_model(sampling):
    model, params, _, draw = sampling
    first = draw(1, num_samples=20000, settings=PLAIN._replace(temperature=0.7))[:, 0]
    logits, _ = jax.jit(model.apply)({"params": params}, np.array([[3]]), model.initial_carry(params, 1))
    expected = 20000 * np.asarray(jax.nn.softmax(logits[0, 0] / 0.7), np.float64)
    chi_squared = ((np.bincount(first, minlength=V) - expected) ** 2 / expected).sum()
    assert chi_squared < 27.9  # The 99.9th percentile for 9 degrees of freedom.


def test_bfloat16_weights(sampling):
    """Only the matrices are bfloat16, and the logits change only by rounding."""
    model, params, full, _ = sampling
    low = make_sampler(model, Vocab.from_chars("abcdefghij"), dtype="bfloat16")
    weights = low.prepare(params)
    assert {leaf.ndim: leaf.dtype for leaf in jax.tree.leaves(weights)} == {1: jnp.float32, 2: jnp.bfloat16}
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(low.start(weights, 2)))
    logits = []
    for dtype, w in (("float32", full.prepare(params)), ("bfloat16", weights)):
        folded = model.folded(dtype)
        logits.append(np.asarray(jax.jit(folded.apply)({"params": w}, np.array([[3]]), folded.initial_carry(w, 1))[0]))
    assert logits[1].dtype == np.float32 and 0 < np.abs(logits[0] - logits[1]).max() < 0.05


def nucleus(logits, top_k, top_p):
    """Return the symbols that may be drawn: the definition of top-k and top-p filtering in plain Python."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])[:top_k]
    weights = [np.exp(logits[i] - logits[order[0]]) for i in order]
    kept, mass = set(), 0.0
    for i, weight in zip(order, weights):
        if kept and mass >= top_p - 1e-9:
            break
        kept.add(i)
        mass += weight / sum(weights)
    return kept


@given(
    st.lists(st.integers(-40, 40), min_size=V, max_size=V, unique=True),
    st.integers(1, V),
    st.floats(0.01, 0.99),
)
def test_top_k_and_top_p_filtering_follow_their_definition(scores, top_k, top_p):
    logits = np.array(scores) / 10 + 0.0123
    kept = np.isfinite(np.asarray(filter_top_k_top_p(jnp.asarray(logits), top_k, top_p)))
    expected = nucleus(logits, top_k, top_p)
    near = {len(nucleus(logits, top_k, top_p + d)) for d in (-1e-4, 1e-4)}
    assert set(np.flatnonzero(kept)) == expected or len(near) > 1


def test_the_strongest_filtering_is_greedy(sampling):
    draw = sampling[3]
    greedy = draw(80, settings=PLAIN._replace(greedy=True))
    assert (draw(80, settings=PLAIN._replace(top_k=1)) == greedy).all()
    assert (draw(80, settings=PLAIN._replace(top_p=1e-6)) == greedy).all()


def test_the_first_sample_is_written_as_it_is_drawn_and_the_others_after_it():
    vocab = Vocab.from_chars("abc")
    written = []

    def pieces():
        yield np.array([[0, 1], [2, 2]])
        assert written == [">", "ab"]
        yield np.array([[2], [0]])

    write_samples(decode_samples(pieces(), vocab, 2), ">", written.append)
    assert "".join(written) == ">abc\n>cca\n"


@pytest.fixture(scope="module")
def byte_sampler():
    """Return an untrained byte model. If all bytes were allowed, most of its draws would not be UTF-8."""
    config = default_config().model
    config.update(hidden_size=4, embedding_size=4)
    vocab = Vocab.all_bytes()
    model = CharLM.from_config(config, vocab.size)
    return make_sampler(model, vocab), jax.jit(model.initial_params)(jax.random.key(0)), vocab


@pytest.mark.parametrize("settings", [{}, {"temperature": 9.0}, {"top_k": 3}, {"top_p": 0.2}, {"greedy": True}])
@pytest.mark.parametrize("prompt", ["a", "漢", "🙂é"])
def test_a_byte_model_draws_valid_utf_8(byte_sampler, settings, prompt):
    sampler, params, vocab = byte_sampler
    settings = Settings(1.0, 256, 1.0, False)._replace(**settings)
    ids = vocab.encode(prompt)
    pieces = list(generate(sampler, params, vocab, ids, sample_keys(0, 8), 300, settings))
    for row in np.concatenate(pieces, axis=1).astype(np.uint8):
        text = vocab.decode(row)
        assert "\ufffd" not in text and row.tobytes().startswith(text.encode()) and len(text.encode()) > 296
    written = []
    write_samples(decode_samples(iter(pieces), vocab, 8), prompt, written.append)
    assert "\ufffd" not in "".join(written) and all(part.startswith(prompt) for part in "".join(written[-7:]).split("\n")[:1])


def test_every_byte_that_can_come_next_is_drawn(byte_sampler):
    sampler, params, vocab = byte_sampler
    draws = np.concatenate(
        list(generate(sampler, params, vocab, vocab.encode("a"), sample_keys(1, 20000), 1, Settings(1.0, 256, 1.0, False)))
    )[:, 0]
    allowed = [byte for byte in range(256) if byte < 0x80 or 0xC2 <= byte <= 0xF4]
    counts = np.bincount(draws, minlength=256)
    assert counts[allowed].sum() == 20000 and (counts[allowed] > 0).all()


def test_a_window_agrees_with_the_carried_state_only_on_the_first_symbol(sampling):
    """After a prompt of W symbols both states are equal. Then the window forgets its first symbol, but the state does not."""
    model, params, carried, _ = sampling
    vocab, window = Vocab.from_chars("abcdefghij"), 12
    sliding = make_sampler(model, vocab, window)
    greedy = PLAIN._replace(greedy=True)
    prompts = np.random.default_rng(0).integers(0, V, (20, window))
    apply = jax.jit(lambda ids: model.apply({"params": params}, ids[:, None], model.initial_carry(params, 1))[0][-1, 0])
    differ = 0
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(30):  # The definition: read the last W symbols from a zero state.
            ids.append(int(jnp.argmax(apply(jnp.asarray(ids[-window:])))))
        from_window, from_state = (
            np.concatenate(list(generate(sampler, params, vocab, prompt, sample_keys(0, 1), 30, greedy)), axis=1)[0].tolist()
            for sampler in (sliding, carried)
        )
        assert from_window == ids[window:]
        assert from_window[0] == from_state[0]
        differ += from_window != from_state
    assert differ
