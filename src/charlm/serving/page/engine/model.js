// The model: symbol in, logits of the next symbol out. `charlm/nn/model.py` defines the same function.

class Layer {
  /** `cell` is from `describe_model`, and `weights` are arrays without the prefix of the layer, such as W_h. */
  constructor(cell, hidden, weights) {
    Object.assign(this, { cell, hidden, weights, products: {} })
    this.gates = Object.fromEntries(cell.gates.map((name) => [name, new Float32Array(hidden)]))
    this.step = STEPS[cell.name]
  }

  /** Return the product of a matrix with a vector, which the next product of this matrix overwrites. */
  dot(name, vector) {
    const W = this.weights[name]
    const out = (this.products[name] ??= new Float64Array(W.length / vector.length))
    multiply(W, vector, out, out.length)
    return out
  }

  /** Return what a step reads of the output of the layer below. */
  read(x) {
    const { cell, weights } = this
    if (cell.readsFeatures) return x
    const input = this.dot("W_x", x)
    if (cell.normGroups.length) {
      layerNorm(input, cell.normGroups, this.hidden)
      for (let i = 0; i < input.length; i++) input[i] *= weights.scale_x[i]
    }
    return add(input, weights.b)
  }

  /** Return the carry at the start of a text, such as {h, c}. */
  initialCarry() {
    return Object.fromEntries(this.cell.carries.map((name, k) => [name, this.weights[`first_${k}`].slice()]))
  }
}

class Model {
  /** `description` is that of `describe_model`, and `arrays` are the weights, from `unpack`. */
  constructor(description, arrays) {
    const { cell, hidden, layers, residual, boundary } = description
    Object.assign(this, { cell, residual, boundary, table: arrays.table })
    this.headW = arrays.head_W.data
    this.headB = arrays.head_b.data
    this.layers = []
    for (let k = 0; k < layers; k++) {
      const weights = {}
      for (const name in arrays) {
        if (name.startsWith(`layer_${k}.`)) weights[name.slice(`layer_${k}.`.length)] = arrays[name].data
      }
      this.layers.push(new Layer(cell, hidden, weights))
    }
    this.logits = new Float32Array(this.headB.length)
    this.sum = new Float32Array(hidden)
  }

  /** Return the state at the start of a text: the carry of each layer. */
  initialState() {
    return this.layers.map((layer) => layer.initialCarry())
  }

  /**
   * Begin to read a text; return {state, logits} before its first symbol. A document begins after a boundary. Otherwise nothing
   * predicts the first symbol, and the logits are null.
   */
  begin(ids) {
    const state = this.initialState()
    const inDocument = this.boundary !== null && ids[0] !== this.boundary
    return { state, logits: inDocument ? this.step(this.boundary, state) : null }
  }

  /**
   * Read a symbol: change the state, and return the logits of the next symbol, which the next call overwrites. The boundary
   * between documents replaces the state before it is read.
   *
   * `clamps` are objects {layer, name, unit, value}, where name is that of a carry.
   */
  step(id, state, clamps = []) {
    const width = this.table.shape[1]
    this.layers.forEach((layer, k) => {
      if (id === this.boundary) state[k] = layer.initialCarry()
      const carry = state[k]
      const hold = (held) => {
        for (const { layer: at, name, unit, value } of clamps) if (at === k && name === held) carry[name][unit] = value
      }
      layer.step(layer, k ? layer.read(this.sum) : this.table.data.subarray(id * width, (id + 1) * width), carry, hold)
      layer.cell.carries.forEach(hold)
      if (k && this.residual) add(this.sum, carry.h)
      else this.sum.set(carry.h)
    })
    multiply(this.headW, this.sum, this.logits, this.logits.length)
    return add(this.logits, this.headB)
  }
}

function copyState(state) {
  return state.map((carry) => Object.fromEntries(Object.entries(carry).map(([name, values]) => [name, values.slice()])))
}
