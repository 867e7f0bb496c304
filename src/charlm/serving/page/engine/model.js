// The model: symbol in, logits of the next symbol out. `charlm/nn/model.py` defines the same function.

class Layer {
  /** `weights` are arrays without the prefix of the layer, such as W_h. The first layer has a table in place of W_x. */
  constructor(cell, hidden, weights) {
    Object.assign(this, { cell, hidden, weights })
    this.input = new Float64Array(cell.blocks * hidden)
    this.projection = new Float64Array(cell.blocks * hidden)
    this.gates = Object.fromEntries(cell.gates.map((name) => [name, new Float32Array(hidden)]))
  }

  /** Return the input projection of the first layer. */
  lookUp(id) {
    const rows = this.input.length
    return this.weights.table.subarray(id * rows, (id + 1) * rows)
  }

  /** Return the input projection of another layer. */
  project(x) {
    const { input, weights } = this
    multiply(weights.W_x, x, input, input.length)
    if (this.cell.normGroups) {
      layerNorm(input, this.cell.normGroups, this.hidden)
      for (let i = 0; i < input.length; i++) input[i] *= weights.scale_x[i]
    }
    for (let i = 0; i < input.length; i++) input[i] += weights.b[i]
    return input
  }
}

class Model {
  /** `description` names the cell and the sizes, and `arrays` are the weights, from `unpack`. */
  constructor(description, arrays) {
    const { cell, hidden, layers, residual } = description
    this.cell = CELLS[cell]
    this.residual = residual
    this.headW = arrays.head_W.data
    this.headB = arrays.head_b.data
    this.layers = []
    for (let k = 0; k < layers; k++) {
      const weights = {}
      for (const name in arrays) {
        if (name.startsWith(`layer_${k}.`)) weights[name.slice(`layer_${k}.`.length)] = arrays[name].data
      }
      this.layers.push(new Layer(this.cell, hidden, weights))
    }
    this.logits = new Float32Array(this.headB.length)
    this.sum = new Float32Array(hidden)
  }

  /** Return the state at the start of a text: for each layer its carry, {h, c}. */
  initialState() {
    return this.layers.map(({ cell, hidden, weights }) =>
      Object.fromEntries(cell.carries.map((name, k) => [name, weights[`first_${k}`]?.slice() ?? new Float32Array(hidden)])),
    )
  }

  /**
   * Read a symbol: change the state, and return the logits of the next symbol, which the next call overwrites.
   * `clamps` are objects {layer, name, unit, value}, where name is that of a carry.
   */
  step(id, state, clamps = []) {
    this.layers.forEach((layer, k) => {
      const clamp = {}
      for (const { layer: at, name, unit, value } of clamps) if (at === k) (clamp[name] ??= []).push([unit, value])
      layer.cell.step(layer, k ? layer.project(this.sum) : layer.lookUp(id), state[k], clamp)
      if (k && this.residual) for (let j = 0; j < this.sum.length; j++) this.sum[j] += state[k].h[j]
      else this.sum.set(state[k].h)
    })
    multiply(this.headW, this.sum, this.logits, this.logits.length)
    for (let i = 0; i < this.logits.length; i++) this.logits[i] += this.headB[i]
    return this.logits
  }
}

function copyState(state) {
  return state.map((carry) => Object.fromEntries(Object.entries(carry).map(([name, values]) => [name, values.slice()])))
}
