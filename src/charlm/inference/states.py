"""Look into a model: step through symbols with an explicit state, and record the states and the gates at every symbol.

Letters: N symbols of a text, K symbols in a block, B batch, T time, H hidden, V vocabulary.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from charlm.data.vocab import Vocab
from charlm.nn.cell import Carry
from charlm.nn.cells import CELLS, SameCell, find_cell
from charlm.nn.model import CharLM
from charlm.system.errors import ConfigError, CorpusError

# One carry for each layer.
State = tuple[Carry, ...]
# (params, ids_TB, state) -> (logits_TBV, state after the last symbol), jitted.
Step = Callable[[Any, Any, State], tuple[jax.Array, State]]
# The number of symbols in one call of a compiled program.
_BLOCK = 64


def make_step(model: CharLM) -> Step:
    """Return the function that a recurrent model is: (params, ids_TB, state) -> (logits_TBV, state), jitted.

    Each number of steps and each batch size is compiled once.
    """
    return _make_step(model, SameCell(model.cell))


# The functions of the latest models are kept, so that a process compiles a model once, however often it is loaded.
@functools.lru_cache(maxsize=8)
def _make_step(model: CharLM, cell: SameCell) -> Step:
    """Return the function of `make_step`."""

    @jax.jit
    def step(params: Any, ids_TB: jax.Array, state: State) -> tuple[jax.Array, State]:
        return model.apply({"params": params}, ids_TB, state)

    return step


def step_through(step: Step, params: Any, ids_N: np.ndarray, state: State) -> tuple[jax.Array, State]:
    """Return the logits after the last of N symbols, shape (1, V), and the state there.

    Two compiled programs serve texts of every length: one for a block of symbols, and one for a single symbol.

    Args:
        step: from `make_step`.
        params: the parameters of the model.
        ids_N: at least one id.
        state: the state before the first symbol, for a batch of one.
    """
    ids_N1 = np.asarray(ids_N, np.int32)[:, None]
    whole = len(ids_N1) - len(ids_N1) % _BLOCK
    for block in [*np.split(ids_N1[:whole], whole // _BLOCK or 1), *np.split(ids_N1[whole:], len(ids_N1) - whole or 1)]:
        if len(block):
            logits_TBV, state = step(params, block, state)
    return logits_TBV[-1], state


def most_probable(logits_V: jax.Array, vocab: Vocab, k: int) -> list[tuple[str | bytes, float]]:
    """Return the k most probable symbols with their probabilities. A symbol of the byte vocabulary is one byte."""
    probs_V = np.asarray(jax.nn.softmax(logits_V), np.float64)
    symbols = [bytes([i]) for i in range(256)] if vocab.kind == "bytes" else vocab.symbols
    return [(symbols[i], float(probs_V[i])) for i in np.argsort(-probs_V, kind="stable")[:k]]


def check_ids(symbols: Any, vocab_size: int) -> np.ndarray:
    """Return ids as an array. Raises CorpusError unless they are symbols of a vocabulary, of shape (T,) or (T, B)."""
    try:
        ids = np.asarray(symbols)
    except ValueError:  # Sequences of different lengths.
        raise CorpusError("the symbols have no shape; they must have shape (T,) or (T, B)") from None
    if ids.ndim not in (1, 2) or not ids.size:
        raise CorpusError(f"the symbols have shape {ids.shape}; they must have shape (T,) or (T, B), and not be empty")
    if not np.issubdtype(ids.dtype, np.integer) or ids.min() < 0 or ids.max() >= vocab_size:
        raise CorpusError(f"ids must be integers from 0 to {vocab_size - 1}, the last symbol of the vocabulary")
    return ids


def check_count(name: str, count: int) -> None:
    """Raise ConfigError if an argument that counts texts or symbols is not above 0."""
    if count < 1:
        raise ConfigError(f"{name} is {count}; it must be above 0")


def check_state(state: State, initial: State) -> None:
    """Raise CorpusError if a state has not the arrays of another state of the same texts, or has values of another kind."""
    same = jax.tree.structure(state) == jax.tree.structure(initial)
    if not same or any(np.shape(a) != np.shape(b) for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(initial))):
        num_texts = jax.tree.leaves(initial)[0].shape[0]
        raise CorpusError(f"the state does not belong to {num_texts} text(s) of this model; see initial_state()")
    if not all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(state)):
        raise CorpusError("the state must hold floating-point numbers; see initial_state()")


def check_gates(model: CharLM) -> None:
    """Raise ConfigError if the model's cell does not show its gates."""
    if find_cell(model.cell).gate_values is None:
        shown = ", ".join(name for name, cell in CELLS.items() if cell.gate_values is not None)
        raise ConfigError(f"the cell {model.cell!r} has no gate_values, so its gates cannot be shown; those of {shown} can")


def record_states(model: CharLM, gates: bool) -> Callable[[Any, np.ndarray], dict[str, np.ndarray]]:
    """Return a function that records what a model holds at every symbol of a text.

    Args:
        model: its architecture.
        gates: whether to record the gates too. `check_gates` says whether the cell shows them.

    Returns:
        (params, ids_N) -> {name: array (N, H), float32}. Row t is that after symbol t. The names are `layer_0.h`, `layer_0.c`
        and so on for the carry of each layer (`Cell.carries`), and `layer_0.gate_i` and so on for its gates (`Cell.gates`). The
        text starts from the initial state.
    """
    return _record_states(model, SameCell(model.cell), gates)


@functools.lru_cache(maxsize=8)
def _record_states(model: CharLM, same: SameCell, gates: bool) -> Callable[[Any, np.ndarray], dict[str, np.ndarray]]:
    """Return the function of `record_states`."""
    cell = find_cell(model.cell)
    folded = model.folded(model.dtype)
    fold = jax.jit(lambda params: model.fold_params(params, model.dtype))

    def name_arrays(state: State, sown: Mapping[str, Any]) -> dict[str, jax.Array]:
        named = {}
        for layer, carry in enumerate(state):
            named |= {f"layer_{layer}.{name}": each_BH[0] for name, each_BH in zip(cell.carries, carry)}
            if gates:
                (values,) = sown[f"layer_{layer}"]["values"]
                named |= {f"layer_{layer}.gate_{name}": gate_BH[0] for name, gate_BH in zip(cell.gates, values)}
        return named

    @jax.jit
    def record_block(weights: Any, ids_K: jax.Array, state: State) -> tuple[State, dict[str, jax.Array]]:
        def record_symbol(state, symbol):
            mutable = ["gates"] if gates else []
            (_, state), sown = folded.apply({"params": weights}, symbol[None, None], state, mutable=mutable)
            return state, name_arrays(state, sown.get("gates", {}))

        return jax.lax.scan(record_symbol, state, ids_K)

    def record(params: Any, ids_N: np.ndarray) -> dict[str, np.ndarray]:
        weights = fold(params)
        state = folded.initial_carry(weights, 1)
        blocks = []
        for start in range(0, len(ids_N), _BLOCK):
            ids_K = np.zeros(_BLOCK, np.int32)  # The last block is filled up, and what belongs to the filling is cut off.
            ids_K[: len(ids_N) - start] = ids_N[start : start + _BLOCK]
            state, block = record_block(weights, jnp.asarray(ids_K), state)
            blocks.append(jax.device_get(block))
        return {name: np.concatenate([block[name] for block in blocks])[: len(ids_N)] for name in blocks[0]}

    return record
