// One time step of each cell. `charlm/nn/core_cells.py` and `charlm/nn/cells.py` define the same steps.
//
// A step reads the input projection x (the gates' blocks one after another), and replaces the carry. It also leaves the values
// of the gates in layer.gates. `clamp` holds units at fixed values: clamp.h and clamp.c are lists of [unit, value].

/** Normalise consecutive groups of a vector to mean 0 and variance 1. Each group has groups[k] blocks of `block` elements. */
function layerNorm(x, groups, block) {
  let start = 0
  for (const blocks of groups) {
    const end = start + blocks * block
    let mean = 0,
      variance = 0
    for (let i = start; i < end; i++) mean += x[i]
    mean /= end - start
    for (let i = start; i < end; i++) variance += (x[i] - mean) ** 2
    const scale = 1 / Math.sqrt(variance / (end - start) + 1e-5)
    for (let i = start; i < end; i++) x[i] = (x[i] - mean) * scale
    start = end
  }
}

function applyClamp(clamp, name, values) {
  for (const [unit, value] of clamp[name] ?? []) values[unit] = value
}

/** Write W_h h to layer.projection, normalised if the cell normalises it. */
function projectState(layer, h) {
  const { projection, weights, cell, hidden } = layer
  multiply(weights.W_h, h, projection, projection.length)
  if (!cell.normGroups) return
  layerNorm(projection, cell.normGroups, hidden)
  for (let i = 0; i < projection.length; i++) projection[i] *= weights.scale_h[i]
}

function rnnStep(layer, x, carry, clamp) {
  projectState(layer, carry.h)
  for (let j = 0; j < layer.hidden; j++) carry.h[j] = Math.tanh(x[j] + layer.projection[j])
  applyClamp(clamp, "h", carry.h)
}

function lstmStep(layer, x, carry, clamp) {
  const { hidden: H, projection: a, weights } = layer
  const { i, f, g, o } = layer.gates
  projectState(layer, carry.h)
  for (let j = 0; j < H; j++) {
    i[j] = sigmoid(x[j] + a[j])
    f[j] = sigmoid(x[H + j] + a[H + j])
    g[j] = Math.tanh(x[2 * H + j] + a[2 * H + j])
    o[j] = sigmoid(x[3 * H + j] + a[3 * H + j])
    carry.c[j] = f[j] * carry.c[j] + i[j] * g[j]
  }
  applyClamp(clamp, "c", carry.c)
  let read = carry.c
  if (layer.cell.normGroups) {
    read = Float64Array.from(carry.c)
    layerNorm(read, [1], H)
    for (let j = 0; j < H; j++) read[j] = weights.scale_c[j] * read[j] + weights.shift_c[j]
  }
  for (let j = 0; j < H; j++) carry.h[j] = o[j] * Math.tanh(read[j])
  applyClamp(clamp, "h", carry.h)
}

function gruStep(layer, x, carry, clamp) {
  const { hidden: H, projection: a, weights } = layer
  const { r, z, n } = layer.gates
  projectState(layer, carry.h)
  for (let j = 0; j < H; j++) {
    r[j] = sigmoid(x[j] + a[j])
    z[j] = sigmoid(x[H + j] + a[H + j])
    n[j] = Math.tanh(x[2 * H + j] + r[j] * (a[2 * H + j] + weights.b_h[j]))
    carry.h[j] = n[j] + z[j] * (carry.h[j] - n[j])
  }
  applyClamp(clamp, "h", carry.h)
}

const CELLS = {
  rnn: { step: rnnStep, carries: ["h"], gates: [], blocks: 1 },
  lstm: { step: lstmStep, carries: ["h", "c"], gates: ["i", "f", "g", "o"], blocks: 4 },
  gru: { step: gruStep, carries: ["h"], gates: ["r", "z", "n"], blocks: 3 },
  ln_lstm: { step: lstmStep, carries: ["h", "c"], gates: ["i", "f", "g", "o"], blocks: 4, normGroups: [4] },
  ln_gru: { step: gruStep, carries: ["h"], gates: ["r", "z", "n"], blocks: 3, normGroups: [2, 1] },
}
