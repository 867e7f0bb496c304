// The activations of a text: those of the given text, stored in few bits, or those of a typed text, from the worker.

// `serving/packing.py` says what the steps mean.
const GATE_STEPS = 15,
  SIGNED_STEPS = 31

class Activations {
  /**
   * `arrays` are those of `record` in the worker, or of the packed activations. `chars` and `ends` are from `Vocab.encode`.
   * `logistic` are the names of the gates whose values lie between 0 and 1.
   */
  constructor(arrays, { chars, ends }, logistic) {
    this.arrays = arrays
    this.logistic = logistic
    this.chars = chars
    this.ends = ends
    this.names = Object.keys(arrays).filter((name) => !name.endsWith(".scale"))
  }

  get layers() {
    return [...new Set(this.names.map((name) => Number(name.match(/^layer_(\d+)/)[1])))]
  }

  /** Return the names of the arrays of a layer, without the layer, such as h, c and gate_f. */
  kinds(layer) {
    const prefix = `layer_${layer}.`
    return this.names.filter((name) => name.startsWith(prefix)).map((name) => name.slice(prefix.length))
  }

  units(name) {
    return this.arrays[name].shape[0]
  }

  /** Whether the values of an array, such as layer_0.gate_f or gate_f, lie between 0 and 1. */
  isLogistic(name) {
    return this.logistic.some((gate) => name.endsWith(`gate_${gate}`))
  }

  /** Return the name of an array for people. */
  label(kind) {
    if (!kind.startsWith("gate_")) return carryLabel(kind)
    const gate = kind.slice("gate_".length)
    if (!this.isLogistic(kind)) return gate === "m" ? "intermediate state m" : `candidate ${gate}`
    return `${{ i: "input", f: "forget", o: "output", r: "reset", z: "update" }[gate]} gate ${gate}`
  }

  /** Return the values of a unit after each character, Float32Array. A character of several bytes has the value after its last. */
  unit(name, unit) {
    const { data, shape } = this.arrays[name]
    const at = unit * shape[1]
    const out = new Float32Array(this.chars.length)
    const scale = this.arrays[`${name}.scale`]?.data[unit]
    for (let i = 0; i < out.length; i++) {
      const value = data[at + Math.max(0, this.ends[i] - 1)]
      if (!(data instanceof Uint8Array)) out[i] = value
      else out[i] = scale === undefined ? value / GATE_STEPS : ((value - SIGNED_STEPS) / SIGNED_STEPS) * scale
    }
    return out
  }

  /** Return the largest magnitude of a unit, by which its colours are scaled: 1 for a gate. */
  largest(name, values) {
    return this.isLogistic(name) ? 1 : values.reduce((most, value) => Math.max(most, Math.abs(value)), 0) || 1
  }
}

/** Return the name of an array of the carry for people. */
function carryLabel(name) {
  return { h: "output h", c: "cell state c", n: "normaliser n", m: "stabiliser m" }[name]
}
