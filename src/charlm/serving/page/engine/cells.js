// One time step of each cell. `charlm/nn/core_cells.py` and `charlm/nn/cells.py` define the same steps.
//
// A step reads x, the input projection (the gates' blocks one after another), and replaces the carry. A cell that reads features
// gets the input itself. A step also leaves the values of the gates in layer.gates. `layer.dot(name, vector)` is the product with
// a matrix of the layer. `hold(name)` sets the held units of a carry to their values: a step calls it for the carries that it
// reads after it has replaced them.

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

/** Add b to a, and return a. */
function add(a, b) {
  for (let i = 0; i < a.length; i++) a[i] += b[i]
  return a
}

/** Return W_h h, normalised if the cell normalises it. */
function projectState(layer, h) {
  const { weights, hidden } = layer
  const { normGroups } = layer.cell
  const a = layer.dot("W_h", h)
  if (normGroups.length) {
    layerNorm(a, normGroups, hidden)
    for (let i = 0; i < a.length; i++) a[i] *= weights.scale_h[i]
  }
  return a
}

function rnnStep(layer, x, carry) {
  const a = add(projectState(layer, carry.h), x)
  for (let j = 0; j < layer.hidden; j++) carry.h[j] = Math.tanh(a[j])
}

/** The LSTM after its products: `a` are the preactivations of i, f, g and o. */
function lstmUpdate(layer, a, carry, hold) {
  const { hidden: H, weights } = layer
  const { i, f, g, o } = layer.gates
  for (let j = 0; j < H; j++) {
    i[j] = sigmoid(a[j])
    f[j] = sigmoid(a[H + j])
    g[j] = Math.tanh(a[2 * H + j])
    o[j] = sigmoid(a[3 * H + j])
    carry.c[j] = f[j] * carry.c[j] + i[j] * g[j]
  }
  hold("c")
  let read = carry.c
  if (layer.cell.normGroups.length) {
    read = Float64Array.from(carry.c)
    layerNorm(read, [1], H)
    for (let j = 0; j < H; j++) read[j] = weights.scale_c[j] * read[j] + weights.shift_c[j]
  }
  for (let j = 0; j < H; j++) carry.h[j] = o[j] * Math.tanh(read[j])
}

function lstmStep(layer, x, carry, hold) {
  lstmUpdate(layer, add(projectState(layer, carry.h), x), carry, hold)
}

function mlstmStep(layer, x, carry, hold) {
  const { hidden: H } = layer
  const { m } = layer.gates
  const a = layer.dot("W_hm", carry.h)
  for (let j = 0; j < H; j++) m[j] = x[j] * a[j]
  lstmUpdate(layer, add(layer.dot("W_h", m), x.subarray(H)), carry, hold)
}

function mogrifierStep(layer, x, carry, hold) {
  const gated = (values, name, by) => {
    const a = layer.dot(name, by)
    return values.map((value, j) => 2 * sigmoid(a[j]) * value)
  }
  let h = carry.h
  for (let k = 1; ; k++) {
    if (`Q_${k}` in layer.weights) x = gated(x, `Q_${k}`, h)
    else if (`R_${k}` in layer.weights) h = gated(h, `R_${k}`, x)
    else break
  }
  lstmUpdate(layer, add(add(layer.dot("W_x", x), layer.dot("W_h", h)), layer.weights.b), carry, hold)
}

function slstmStep(layer, x, carry, hold) {
  const { hidden: H } = layer
  const { i, f, z, o } = layer.gates
  const a = add(layer.dot("W_h", carry.h), x)
  for (let j = 0; j < H; j++) {
    const decayed = logSigmoid(a[H + j]) + carry.m[j]
    carry.m[j] = Math.max(decayed, a[j])
    i[j] = Math.exp(a[j] - carry.m[j])
    f[j] = Math.exp(decayed - carry.m[j])
    z[j] = Math.tanh(a[2 * H + j])
    o[j] = sigmoid(a[3 * H + j])
    carry.c[j] = f[j] * carry.c[j] + i[j] * z[j]
    carry.n[j] = f[j] * carry.n[j] + i[j]
  }
  hold("c")
  hold("n")
  for (let j = 0; j < H; j++) carry.h[j] = (o[j] * carry.c[j]) / carry.n[j]
}

function cifgStep(layer, x, carry, hold) {
  const { hidden: H } = layer
  const { f, g, o } = layer.gates
  const a = add(layer.dot("W_h", carry.h), x)
  for (let j = 0; j < H; j++) {
    f[j] = sigmoid(a[j])
    g[j] = Math.tanh(a[H + j])
    o[j] = sigmoid(a[2 * H + j])
    carry.c[j] = g[j] + f[j] * (carry.c[j] - g[j])
  }
  hold("c")
  for (let j = 0; j < H; j++) carry.h[j] = o[j] * Math.tanh(carry.c[j])
}

function gruStep(layer, x, carry) {
  const { hidden: H, weights } = layer
  const { r, z, n } = layer.gates
  const a = projectState(layer, carry.h)
  for (let j = 0; j < H; j++) {
    r[j] = sigmoid(x[j] + a[j])
    z[j] = sigmoid(x[H + j] + a[H + j])
    n[j] = Math.tanh(x[2 * H + j] + r[j] * (a[2 * H + j] + weights.b_h[j]))
    carry.h[j] = n[j] + z[j] * (carry.h[j] - n[j])
  }
}

function mguStep(layer, x, carry) {
  const { hidden: H } = layer
  const { f, n } = layer.gates
  const a = layer.dot("W_f", carry.h)
  for (let j = 0; j < H; j++) f[j] = sigmoid(x[j] + a[j])
  const b = layer.dot(
    "W_n",
    carry.h.map((h, j) => f[j] * h),
  )
  for (let j = 0; j < H; j++) {
    n[j] = Math.tanh(x[H + j] + b[j])
    carry.h[j] += f[j] * (n[j] - carry.h[j])
  }
}

function indrnnStep(layer, x, carry) {
  const { u } = layer.weights
  for (let j = 0; j < layer.hidden; j++) carry.h[j] = Math.max(0, x[j] + u[j] * carry.h[j])
}

function minGruStep(layer, x, carry) {
  const { hidden: H } = layer
  const { z, n } = layer.gates
  for (let j = 0; j < H; j++) {
    z[j] = sigmoid(x[j])
    n[j] = x[H + j]
    carry.h[j] = (1 - z[j]) * carry.h[j] + z[j] * n[j]
  }
}

function minLstmStep(layer, x, carry) {
  const { hidden: H } = layer
  const { f, i, n } = layer.gates
  for (let j = 0; j < H; j++) {
    const difference = logSigmoid(x[j]) - logSigmoid(x[H + j])
    f[j] = sigmoid(difference)
    i[j] = sigmoid(-difference)
    n[j] = x[2 * H + j]
    carry.h[j] = f[j] * carry.h[j] + i[j] * n[j]
  }
}

// What else a cell declares comes with the model: `describe_model` in `serving/weights.py`.
const STEPS = {
  rnn: rnnStep,
  lstm: lstmStep,
  gru: gruStep,
  ln_lstm: lstmStep,
  ln_gru: gruStep,
  mlstm: mlstmStep,
  mogrifier_lstm: mogrifierStep,
  slstm: slstmStep,
  cifg_lstm: cifgStep,
  mgu: mguStep,
  indrnn: indrnnStep,
  min_gru: minGruStep,
  min_lstm: minLstmStep,
}
