"""CharLM: character ids in, logits of the next character out. A Flax Linen module: pure `init` and `apply`.

    ids --encoding--> recurrent layers, dropout after each --> head --> logits

Letters: B batch, T time, H hidden, V vocabulary, E embedding, I input features, G gates times hidden, L layers.
Sequences are time-major, as the scan reads them.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from charlm.nn import cudnn, recurrence
from charlm.nn.cells import CELLS, Carry, normalise

ENCODINGS = ("embedding", "one_hot", "scalar")
DTYPES = ("float32", "bfloat16")
RECURRENCES = ("auto", "scan", "cudnn")
RECURRENT_INITS = ("orthogonal", "lecun_normal")


class RecurrentLayer(nn.Module):
    """One layer of a cell.

    Parameters: W_x (I, G), b (G,), W_h (G, H), and the cell's own (`Cell.vectors`); gate blocks in the order of `Cell.gates`.
    For a cell that normalises also scale_x (G,), and with `learn_initial_state` first_0, first_1, ... (H,), the state that
    a text starts from.
    """

    cell: str
    hidden_size: int
    recurrent_dropout: float
    recurrent_init: str
    init_std: float | None
    forget_bias: float
    learn_initial_state: bool
    recurrence: str
    dtype: str

    @nn.compact
    def __call__(self, inputs: recurrence.Inputs, carry: Carry, train: bool) -> tuple[jax.Array, Carry]:
        """h_TBH and the last state."""
        cell = CELLS[self.cell]
        hidden, gates = self.hidden_size, len(cell.gates)
        init_x = _weight_init(self.init_std, nn.initializers.lecun_normal())
        init_h = _weight_init(self.init_std, _per_gate(_RECURRENT_INITS[self.recurrent_init], gates))
        W_x = self.param("W_x", init_x, (inputs.size, gates * hidden), jnp.float32)
        W_h = self.param("W_h", init_h, (gates * hidden, hidden), jnp.float32)
        b = self.param("b", _bias_init(cell.gates, hidden, self.forget_bias), (gates * hidden,), jnp.float32)
        vectors = {each.name: self._blocks(*each) for each in cell.vectors}
        scale_x = self._blocks("scale_x", gates, 1.0) if cell.norm_groups else None
        if self.learn_initial_state:
            for k in range(cell.carries):
                self._blocks(f"first_{k}", 1, 0.0)  # `CharLM.initial_carry` reads them.

        def finish(product):  # (..., G, columns)
            product = product.astype(b.dtype)
            if scale_x is not None:
                product = scale_x[:, None] * normalise(product, cell.norm_groups, axis=-2)
            return product + b[:, None]

        # DropConnect (Wan et al. 2013; Merity et al. 2018): some recurrent weights are 0 for all steps of a window.
        W_h = _dropout(self, W_h, self.recurrent_dropout, W_h.shape, train)
        if self.recurrence == "cudnn":
            return cudnn.unroll(W_x, W_h, b, inputs.columns(), carry)
        return recurrence.unroll(cell, vectors, W_h, inputs.project(W_x, finish, self.dtype), carry, self.dtype)

    def _blocks(self, name: str, blocks: int, init: float) -> jax.Array:
        """A vector of so many blocks of H numbers."""
        return self.param(name, nn.initializers.constant(init), (blocks * self.hidden_size,), jnp.float32)


def is_zero(number) -> bool:
    """Whether a number is 0 already when the program is made, so that what it switches can be left out of it."""
    return isinstance(number, (int, float)) and number == 0


def _dropout(module: nn.Module, x: jax.Array, rate, mask_shape: tuple[int, ...], train: bool) -> jax.Array:
    """Dropout (Srivastava et al. 2014) with a mask that is broadcast to x; the rate may be traced, which Flax's may not."""
    if not train or is_zero(rate):
        return x
    # 16 random bits decide as well as 32 do (the rate is met to 1e-5) and cost half.
    bits = jax.random.bits(module.make_rng("dropout"), mask_shape, jnp.uint16)
    keep = bits >= jnp.round(rate * (1 << 16)).astype(jnp.uint16)
    return jnp.where(keep, x / (1 - rate), 0)


_RECURRENT_INITS = {
    "orthogonal": nn.initializers.orthogonal(),  # Saxe et al. 2014
    "lecun_normal": nn.initializers.lecun_normal(),
}


def _weight_init(std: float | None, otherwise):
    """A normal distribution of a given standard deviation, or another initialiser where none is given."""
    return otherwise if std is None else nn.initializers.normal(std)


def _per_gate(init, gates: int):
    """An initialiser for (gates * H, H) that draws each gate's square block by itself."""

    def initialise(key, shape, dtype=jnp.float32):
        hidden = shape[1]
        # One after another: LAPACK's calls with several matrices share one pool of threads, in which two such calls at once, as
        # of two layers, wait for each other for ever.
        blocks = jax.lax.map(lambda k: init(k, (hidden, hidden), dtype).T, jax.random.split(key, gates))
        return blocks.reshape(shape)

    return initialise


def _bias_init(gates: tuple[str, ...], hidden: int, forget_bias: float):
    """Zero but for the forget gate, which starts open (Gers et al. 2000; Jozefowicz et al. 2015)."""

    def initialise(key, shape, dtype=jnp.float32):
        del key, shape
        return jnp.concatenate([jnp.full(hidden, forget_bias if gate == "f" else 0.0, dtype) for gate in gates])

    return initialise


class CharLM(nn.Module):
    """A recurrent language model over V symbols.

    Attributes: as the keys of `config.model`, and `vocab_size` V; `recurrence` is scan or cudnn.
    """

    vocab_size: int
    cell: str
    hidden_size: int
    num_layers: int
    encoding: str
    embedding_size: int
    dropout: float
    variational_dropout: bool
    recurrent_dropout: float
    residual: bool
    tie_weights: bool
    learn_initial_state: bool
    recurrent_init: str
    init_std: float | None
    forget_bias: float
    recurrence: str
    dtype: str

    @classmethod
    def from_config(cls, model, vocab_size: int) -> "CharLM":
        """The model of a config, with cuDNN's recurrence where the config allows it and the device has it, else the scan."""
        fast = model.recurrence != "scan" and cudnn.can_do(model.cell, model.dtype) and cudnn.is_available()
        return cls(vocab_size=vocab_size, **model.to_dict() | {"recurrence": "cudnn" if fast else "scan"})

    @nn.compact
    def __call__(
        self, ids_TB: jax.Array, carry: tuple[Carry, ...], train: bool = False, only_last: bool = False
    ) -> tuple[jax.Array, tuple[Carry, ...]]:
        """Logits of the character after each input.

        Args:
            ids_TB: character ids.
            carry: one state a layer, from `initial_carry` or an earlier call.
            train: apply dropout; needs an rng named `dropout`. `variational_dropout` draws one mask for all steps
                (Gal and Ghahramani 2016), here of what goes from layer to layer.
            only_last: the logits after the last input alone.

        Returns:
            logits_TBV in the parameters' dtype (T = 1 with `only_last`), and the states after the last character. Into
            the collection `activations`, where it is mutable, go the outputs of the last layer: `output` (T, B, H), and
            `dropped`, what of it reaches the head.
        """
        learnt_VE = None
        if self.encoding == "embedding":
            # One that is the head's kernel too begins as small as a head.
            init = _weight_init(self.init_std, nn.initializers.normal(self.hidden_size**-0.5 if self.tie_weights else 1.0))
            learnt_VE = self.param("embedding", init, (self.vocab_size, self.embedding_size), jnp.float32)
        embedding_VE = self._embedding(learnt_VE, carry[0][0].dtype)
        inputs = recurrence.from_ids(ids_TB, embedding_VE, self.vocab_size)
        h_TBH, last = None, []
        for layer in range(self.num_layers):
            output_TBH, layer_carry = RecurrentLayer(
                self.cell,
                self.hidden_size,
                self.recurrent_dropout,
                self.recurrent_init,
                self.init_std,
                self.forget_bias,
                self.learn_initial_state,
                self.recurrence,
                self.dtype,
                name=f"layer_{layer}",
            )(inputs, carry[layer], train)
            last.append(layer_carry)
            steps = slice(-1, None) if only_last and layer == self.num_layers - 1 else slice(None)
            read_TBH = output_TBH[steps]
            mask_shape = (1, *read_TBH.shape[1:]) if self.variational_dropout else read_TBH.shape
            dropped_TBH = _dropout(self, read_TBH, self.dropout, mask_shape, train)
            # Around a layer, past its dropout (Prakash et al. 2016); the first has an input of another size.
            h_TBH = h_TBH[steps] + dropped_TBH if self.residual and layer else dropped_TBH
            inputs = recurrence.from_layer(jnp.swapaxes(h_TBH, 1, 2))
        self.sow("activations", "output", output_TBH)
        self.sow("activations", "dropped", dropped_TBH)
        if self.tie_weights:  # Press and Wolf 2017; Inan et al. 2017
            W_HV = embedding_VE.T
        else:
            init = _weight_init(self.init_std, nn.initializers.lecun_normal())
            W_HV = self.param("head_W", init, (self.hidden_size, self.vocab_size), jnp.float32)
        b_V = self.param("head_b", nn.initializers.zeros, (self.vocab_size,), jnp.float32)
        return recurrence.matmul(h_TBH, W_HV, self.dtype) + b_V, tuple(last)

    def initial_carry(self, params, batch_size: int) -> tuple[Carry, ...]:
        """The states that `batch_size` texts start from: zero, or with `learn_initial_state` those in the parameters."""
        carries, dtype = range(CELLS[self.cell].carries), params["head_b"].dtype

        def first(layer: int, k: int):
            if self.learn_initial_state:
                return jnp.broadcast_to(params[f"layer_{layer}"][f"first_{k}"], (batch_size, self.hidden_size))
            return jnp.zeros((batch_size, self.hidden_size), dtype)

        # One array each: a donated state must not hold the same buffer twice.
        return tuple(tuple(first(layer, k) for k in carries) for layer in range(self.num_layers))

    def folded(self, dtype: str) -> "CharLM":
        """The model that is the same function of ids with the parameters of `fold`."""
        return self.clone(encoding="one_hot", tie_weights=False, recurrence="scan", dtype=dtype)

    def fold(self, params, dtype: str) -> Any:
        """Parameters with all done that need be done once only where no gradient is asked for.

        The embedding and the first layer's input kernel are one table. Kernels are kept in `dtype`; biases, sums and states
        stay as they are.
        """
        params = dict(params)
        layer = dict(params["layer_0"])
        embedding_VE = self._embedding(params.pop("embedding", None), layer["W_x"].dtype)
        if self.tie_weights:
            params["head_W"] = embedding_VE.T
        if embedding_VE is not None:
            layer["W_x"] = recurrence.matmul(embedding_VE, layer["W_x"], self.dtype)
        params["layer_0"] = layer
        return jax.tree.map(lambda p: p.astype(dtype) if p.ndim == 2 else p, params)

    def _embedding(self, learnt_VE: jax.Array | None, dtype) -> jax.Array | None:
        """What stands for each symbol before the first layer; None: itself, one-hot."""
        if self.encoding == "scalar":
            # A fixed table, so that this is a lookup like the others: id i is the number i / V.
            return jnp.arange(self.vocab_size, dtype=dtype)[:, None] / self.vocab_size
        return learnt_VE

    def initial_params(self, key: jax.Array):
        """Parameters drawn from a key, float32."""
        carry = ((jnp.zeros((1, self.hidden_size), jnp.float32),) * CELLS[self.cell].carries,) * self.num_layers
        return self.clone(recurrence="scan").init(key, jnp.zeros((1, 1), jnp.int32), carry)["params"]


def num_params(params) -> int:
    """How many numbers a parameter tree holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
