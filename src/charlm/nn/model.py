"""CharLM, a Flax Linen module: character ids in, logits of the next character out. `init` and `apply` are pure functions.

    ids --encoding--> recurrent layers, each followed by dropout --> head --> logits

Letters: B batch, T time, H hidden, V vocabulary, E embedding, I input features, G gates times hidden, L layers.
Sequences are time-major, because the loop over time reads one step after another.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from ml_collections import ConfigDict

from charlm.nn import cudnn, recurrence
from charlm.nn.cell import Carry, Cell, Initializer, Matrix
from charlm.nn.cells import find_cell, layer_norm
from charlm.nn.dropout import draw_noise, drop_outputs, drop_weights
from charlm.nn.inputs import Inputs, from_ids, from_layer
from charlm.nn.products import matmul
from charlm.nn.resets import Resets, start_step

ENCODINGS = ("embedding", "one_hot", "scalar")
DTYPES = ("float32", "bfloat16")
RECURRENCES = ("auto", "scan", "cudnn")
RECURRENT_INITS = ("orthogonal", "lecun_normal")

Params = Mapping[str, Any]


class RecurrentLayer(nn.Module):
    """A layer that unrolls one cell over time.

    Parameters: W_x (I, G), b (G,), and the matrices and vectors of the cell (`Cell.shapes`). The blocks of the gates are in the
    order of `Cell.gates`. A cell that normalises its projections adds scale_x (G,). `learn_initial_state` adds first_0,
    first_1, ... (H,), the carry at the start of a text.
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
    def __call__(
        self, inputs: Inputs, carry: Carry, train: bool, reset_TB: jax.Array | None = None, first_row: int | jax.Array = 0
    ) -> tuple[jax.Array, Carry]:
        """Return the outputs h_TBH and the carry after the last step.

        `reset_TB` selects steps that start a text. `first_row` is the index of the first row, for the noise of a cell.
        """
        cell, hidden = find_cell(self.cell), self.hidden_size
        shapes = cell.shapes(hidden, inputs.size)
        init_x = _weight_init(self.init_std, nn.initializers.lecun_normal())
        W_x = self.param("W_x", init_x, shapes["W_x"], jnp.float32)
        inits = {each.name: _weight_init(self.init_std, _matrix_init(each, self.recurrent_init)) for each in cell.matrices}
        matrices = {name: self.param(name, init, shapes[name], jnp.float32) for name, init in inits.items()}
        b = self.param("b", _bias_init(cell, hidden, self.forget_bias), shapes["b"], jnp.float32)
        vectors = {each.name: self._vector(*each) for each in cell.vectors}
        scale_x = self._vector("scale_x", len(cell.gates), 1.0) if cell.norm_groups else None
        first = [cell.initial_value(k) for k in range(len(cell.carries))]
        if self.learn_initial_state:  # `CharLM.initial_carry` reads these parameters too.
            first = [self._vector(f"first_{k}", 1, value) for k, value in enumerate(first)]
        resets = None
        if reset_TB is not None:
            resets = Resets(reset_TB, tuple(jnp.broadcast_to(jnp.asarray(each, b.dtype), hidden)[:, None] for each in first))

        def finish(product: jax.Array) -> jax.Array:  # (..., G, columns)
            product = product.astype(b.dtype)
            if scale_x is not None:
                product = scale_x[:, None] * layer_norm(product, cell.norm_groups, axis=-2)
            return product + b[:, None]

        if train and not is_static_zero(self.recurrent_dropout):
            rate = self.recurrent_dropout
            matrices = {name: drop_weights(self.make_rng("dropout"), W, rate) for name, W in matrices.items()}
        if self.recurrence == "cudnn":
            return cudnn.unroll(W_x, matrices["W_h"], b, inputs.features(), carry)
        if cell.reads_features:
            x_TKB, vectors, matrices = inputs.features().astype(b.dtype), vectors | {"b": b}, matrices | {"W_x": W_x.T}
        else:
            x_TKB = inputs.project(W_x, finish, self.dtype)
        if self.is_initializing():  # Only the shape of the outputs is read.
            return jnp.zeros((len(x_TKB), x_TKB.shape[2], hidden), b.dtype), carry
        if self.is_mutable_collection("gates"):
            start = tuple(each.T for each in start_step(resets, 0, tuple(each.T for each in carry)))
            values = recurrence.first_gate_values(cell, vectors, matrices, x_TKB, start, self.dtype)
            self.sow("gates", "values", values)
        noise_TKB = None
        if train and cell.noise:
            shape_TK = len(x_TKB), cell.noise * hidden
            noise_TKB = draw_noise(self.make_rng("dropout"), shape_TK, x_TKB.shape[2], first_row, b.dtype)
        return recurrence.unroll(cell, vectors, matrices, x_TKB, carry, self.dtype, noise_TKB, resets)

    def _vector(self, name: str, blocks: int, init: float | Initializer) -> jax.Array:
        """Return a vector parameter of `blocks` times H elements, all of which start at `init`, or which `init` draws."""
        init = init if callable(init) else nn.initializers.constant(init)
        return self.param(name, init, (blocks * self.hidden_size,), jnp.float32)


def is_static_zero(number: Any) -> bool:
    """Return whether a number is 0 and known while the program is traced. If so, the program can omit what it multiplies."""
    return isinstance(number, (int, float)) and number == 0


_RECURRENT_INITS = {
    "orthogonal": nn.initializers.orthogonal(),  # Saxe et al. 2014
    "lecun_normal": nn.initializers.lecun_normal(),
}


def _weight_init(std: float | None, default: Initializer) -> Initializer:
    """Return the initialiser of a normal distribution with standard deviation `std`, or `default` if `std` is None."""
    if is_static_zero(std):  # Zeros need no random numbers. No config has this value; it serves where only shapes are wanted.
        return nn.initializers.zeros
    return default if std is None else nn.initializers.normal(std)


def _per_gate(init: Initializer, gates: int) -> Initializer:
    """Return an initialiser for shape (gates * H, H) that draws the square block of each gate separately."""

    def initialise(key, shape, dtype=jnp.float32):
        hidden = shape[1]
        # One block after another. LAPACK calls with several matrices share one thread pool, where two concurrent calls, such as
        # those of two layers, can deadlock.
        blocks = jax.lax.map(lambda k: init(k, (hidden, hidden), dtype).T, jax.random.split(key, gates))
        return blocks.reshape(shape)

    return initialise


def _matrix_init(matrix: Matrix, recurrent_init: str) -> Initializer:
    """Return the initialiser of a matrix of a cell, without `init_std`."""
    if matrix.init is not None:
        return matrix.init
    if isinstance(matrix.rows, int) and matrix.columns == 1:
        return _per_gate(_RECURRENT_INITS[recurrent_init], matrix.rows)
    return nn.initializers.lecun_normal(in_axis=-1, out_axis=-2)


def _bias_init(cell: Cell, hidden: int, forget_bias: float | jax.Array) -> Initializer:
    """Return an initialiser with `forget_bias` for the open gates of a cell and 0 for the other gates.

    A positive forget bias opens the forget gate at the start of training (Gers et al. 2000; Jozefowicz et al. 2015).
    """

    def initialise(key, shape, dtype=jnp.float32):
        del key, shape
        values = (forget_bias if gate in cell.open_gates else 0.0 for gate in cell.gates)
        return jnp.concatenate([jnp.full(hidden, value, dtype) for value in values])

    return initialise


class CharLM(nn.Module):
    """A recurrent language model over V symbols.

    Attributes: the keys of `config.model`, and `vocab_size` V. `recurrence` is scan or cudnn, not auto. `boundary` is the id of
    the symbol between the documents of a text; None for a text that has none. A layer that reads this symbol replaces its carry
    by the initial carry first, so nothing passes from a document to the next one.
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
    boundary: int | None = None

    @classmethod
    def from_config(cls, model: ConfigDict, vocab_size: int, boundary: int | None = None) -> "CharLM":
        """Return the model of `config.model`, with cuDNN if the config allows it and the device supports it, else the scan.

        With a boundary the model uses the scan, because cuDNN has no reset inside a window.
        """
        use_cudnn = model.recurrence != "scan" and cudnn.supports(model.cell, model.dtype) and cudnn.is_available()
        use_cudnn = use_cudnn and boundary is None
        fields = model.to_dict() | {"recurrence": "cudnn" if use_cudnn else "scan", "boundary": boundary}
        return cls(vocab_size=vocab_size, **fields)

    @nn.compact
    def __call__(
        self,
        ids_TB: jax.Array | Inputs,
        carry: tuple[Carry, ...],
        train: bool = False,
        only_last: bool = False,
        first_row: int | jax.Array = 0,
    ) -> tuple[jax.Array, tuple[Carry, ...]]:
        """Return the logits of the character after each input.

        Args:
            ids_TB: character ids; or the `Inputs` of the first layer, for gradients with respect to them (`features`). No
                step then replaces the carry.
            carry: one carry for each layer, from `initial_carry` or from an earlier call.
            train: whether to apply dropout, which needs an rng named `dropout`. `variational_dropout` draws one mask for all
                steps (Gal and Ghahramani 2016). Here it applies to the outputs of the layers, not to the recurrent state.
            only_last: whether to return only the logits after the last input.
            first_row: the index of the first of the B rows in the whole batch. The masks of a row depend on its index.

        Returns:
            logits_TBV in the dtype of the parameters (T = 1 with `only_last`), and the carries after the last character. If the
            collection `activations` is mutable, it receives the outputs of the last layer before dropout, `output` (T, B, H),
            and after dropout, `dropped` (T or 1, B, H). If the collection `gates` is mutable, it receives the values of the
            gates of every layer in the first step, one array (B, H) for each gate (`Cell.gate_values`).
        """
        learned_VE = None
        if self.encoding == "embedding":
            # A tied embedding is also the head's kernel, so it starts with the scale of a head.
            init = _weight_init(self.init_std, nn.initializers.normal(self.hidden_size**-0.5 if self.tie_weights else 1.0))
            learned_VE = self.param("embedding", init, (self.vocab_size, self.embedding_size), jnp.float32)
        embedding_VE = self._embedding(learned_VE, carry[0][0].dtype)
        inputs, reset_TB = ids_TB, None
        if not isinstance(ids_TB, Inputs):
            inputs = from_ids(ids_TB, embedding_VE, self.vocab_size)
            reset_TB = None if self.boundary is None else ids_TB == self.boundary
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
            )(inputs, carry[layer], train, reset_TB, first_row)
            last.append(layer_carry)
            steps = slice(-1, None) if only_last and layer == self.num_layers - 1 else slice(None)
            dropped_TBH = output_TBH[steps]
            if train and not is_static_zero(self.dropout):
                key = self.make_rng("dropout")
                dropped_TBH = drop_outputs(key, dropped_TBH, self.dropout, first_row, self.variational_dropout)
            # The residual connection bypasses a layer and its dropout (Prakash et al. 2016). The first layer has none, because
            # the size of its input is not H.
            h_TBH = h_TBH[steps] + dropped_TBH if self.residual and layer else dropped_TBH
            inputs = from_layer(jnp.swapaxes(h_TBH, 1, 2))
        self.sow("activations", "output", output_TBH)
        self.sow("activations", "dropped", dropped_TBH)
        if self.tie_weights:  # Press and Wolf 2017; Inan et al. 2017
            W_HV = embedding_VE.T
        else:
            init = _weight_init(self.init_std, nn.initializers.lecun_normal())
            W_HV = self.param("head_W", init, (self.hidden_size, self.vocab_size), jnp.float32)
        b_V = self.param("head_b", nn.initializers.zeros, (self.vocab_size,), jnp.float32)
        return matmul(h_TBH, W_HV, self.dtype) + b_V, tuple(last)

    def initial_carry(self, params: Params, batch_size: int) -> tuple[Carry, ...]:
        """Return the carry of every layer at the start of `batch_size` texts, arrays of shape (batch_size, H).

        The carry is that of the cell (`Cell.initial`), or with `learn_initial_state` it comes from the parameters.
        """
        cell, dtype = find_cell(self.cell), params["head_b"].dtype

        def initial(layer: int, k: int) -> jax.Array:
            if self.learn_initial_state:
                return jnp.broadcast_to(params[f"layer_{layer}"][f"first_{k}"], (batch_size, self.hidden_size))
            return jnp.full((batch_size, self.hidden_size), cell.initial_value(k), dtype)

        # A separate array for each, because a donated state must not hold the same buffer twice.
        return tuple(tuple(initial(layer, k) for k in range(len(cell.carries))) for layer in range(self.num_layers))

    def features(self, params: Params, ids_TB: jax.Array) -> jax.Array:
        """Return the input of the first layer, x_TIB. `from_layer` of it computes what the ids compute."""
        return from_ids(ids_TB, self._embedding(params.get("embedding"), params["head_b"].dtype), self.vocab_size).features()

    def folded(self, dtype: str) -> "CharLM":
        """Return the model that computes the same function from the parameters of `fold_params(params, dtype)`."""
        folded = self.clone(recurrence="scan", dtype=dtype)
        if find_cell(self.cell).reads_features:  # Its first layer has no projection that a table could replace.
            return folded
        return folded.clone(encoding="one_hot", tie_weights=False)

    def fold_params(self, params: Params, dtype: str) -> Params:
        """Return the parameters for repeated use without gradients, with all constant work done once.

        The product of the embedding and the first layer's input kernel becomes one table. Kernels are cast to `dtype`; biases
        and the other vectors keep their dtype.
        """
        params = dict(params)
        kept = {}
        if find_cell(self.cell).reads_features:
            kept = {"embedding": params["embedding"]} if "embedding" in params else {}
        else:
            layer = dict(params["layer_0"])
            embedding_VE = self._embedding(params.pop("embedding", None), layer["W_x"].dtype)
            if self.tie_weights:
                params["head_W"] = embedding_VE.T
            if embedding_VE is not None:
                layer["W_x"] = matmul(embedding_VE, layer["W_x"], self.dtype)
            params["layer_0"] = layer
        return jax.tree.map(lambda p: p.astype(dtype) if p.ndim == 2 else p, params) | kept

    def _embedding(self, learned_VE: jax.Array | None, dtype: DTypeLike) -> jax.Array | None:
        """Return the features of each symbol, shape (V, E); None for one-hot vectors."""
        if self.encoding == "scalar":
            # The feature of id i is i / V. A fixed table lets the layer use the same lookup as for an embedding.
            return jnp.arange(self.vocab_size, dtype=dtype)[:, None] / self.vocab_size
        return learned_VE

    def initial_params(self, key: jax.Array) -> Params:
        """Return parameters drawn with a PRNG key, float32."""
        carry = ((jnp.zeros((1, self.hidden_size), jnp.float32),) * len(find_cell(self.cell).carries),) * self.num_layers
        return self.clone(recurrence="scan").init(key, jnp.zeros((1, 1), jnp.int32), carry)["params"]

    def param_shapes(self) -> Params:
        """Return the shapes and dtypes of the parameters."""
        return jax.eval_shape(self.clone(init_std=0.0).initial_params, jax.random.key(0))


def num_params(params: Params) -> int:
    """Return the number of elements in a parameter tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
