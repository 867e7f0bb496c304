// Draw symbols as `charlm/inference/sampler.py` does, with the same random numbers.

const TINY_TEMPERATURE = 1e-30
// In the automaton of UTF-8, for a byte that cannot come next.
const FORBIDDEN = 255

/** Set the logits that top-k and then top-p filtering exclude to -Infinity. All sums are in float32, as in Python. */
function filterTopKTopP(logits, topK, topP) {
  const order = Array.from(logits.keys()).sort((a, b) => logits[b] - logits[a] || a - b)
  const kept = order.slice(0, topK)
  const exps = Float32Array.from(kept, (id) => Math.exp(logits[id] - logits[order[0]]))
  const total = exps.reduce((sum, each) => Math.fround(sum + each), 0)
  const excluded = new Set(order.slice(topK))
  let sum = 0
  kept.forEach((id, rank) => {
    const probability = Math.fround(exps[rank] / total)
    sum = Math.fround(sum + probability)
    if (rank > 0 && !(Math.fround(sum - probability) < Math.fround(topP))) excluded.add(id)
  })
  for (const id of excluded) logits[id] = -Infinity
}

/** Return the id that is drawn from logits, with a key or greedily (key null). The logits are changed. */
function draw(logits, key, { temperature, topK, topP }) {
  const divisor = Math.fround(temperature)
  const shift = divisor < TINY_TEMPERATURE ? logits.reduce((a, b) => Math.max(a, b)) : 0
  for (let i = 0; i < logits.length; i++) logits[i] = Math.fround(logits[i] - shift) / divisor
  if (topK < logits.length || topP < 1) filterTopKTopP(logits, topK, topP)
  const noise = key && gumbel(key, logits.length)
  let best = 0,
    largest = -Infinity
  for (let i = 0; i < logits.length; i++) {
    const value = noise ? Math.fround(logits[i] + noise[i]) : logits[i]
    if (value > largest) [best, largest] = [i, value]
  }
  return best
}

/**
 * Yield the ids that continue a prompt.
 *
 * settings: temperature, topK (or null), topP (or null), greedy, seed, length, window, clamps. With a window of W symbols, the
 * last W symbols are read again from the initial state for each draw. `transitions` is the automaton of UTF-8 for bytes.
 */
function* generate(model, promptIds, settings, transitions) {
  const { seed, length, greedy, window = 0, clamps = [] } = settings
  const how = { temperature: settings.temperature, topK: settings.topK ?? Infinity, topP: settings.topP ?? 1 }
  const key = foldIn(keyOf(seed), 0) // The key of the first sample.
  const ids = [...promptIds]
  let state = model.initialState(),
    logits
  let utf8 = 0
  const advance = (id) => {
    if (transitions) utf8 = transitions[utf8 * 256 + id]
    if (!window) logits = model.step(id, state, clamps)
  }
  ids.forEach(advance)
  for (let drawn = 0; drawn < length; drawn++) {
    if (window) {
      state = model.initialState()
      for (const id of ids.slice(-window)) logits = model.step(id, state, clamps)
    }
    const allowed = logits.slice()
    if (transitions) for (let id = 0; id < 256; id++) if (transitions[utf8 * 256 + id] === FORBIDDEN) allowed[id] = -Infinity
    const id = draw(allowed, greedy ? null : foldIn(key, ids.length), how)
    ids.push(id)
    yield id
    if (drawn + 1 < length) advance(id)
  }
}

/** Cut a growing text before the first of some stop strings. What may be the beginning of a stop string is held back. */
class StopFinder {
  constructor(stops) {
    Object.assign(this, { stops, held: "", stopped: false })
  }

  /** Return the text that a piece adds. */
  feed(piece) {
    if (this.stopped || !this.stops.length) return this.stopped ? "" : piece
    const text = this.held + piece
    // A stop string that may still be completed can begin before one that is complete.
    let sure = text.length
    for (const stop of this.stops) {
      for (let n = 1; n < stop.length; n++) if (text.endsWith(stop.slice(0, n))) sure = Math.min(sure, text.length - n)
    }
    const found = this.find(text)
    this.stopped = found <= sure && found < text.length
    const end = Math.min(found, sure)
    this.held = text.slice(end)
    return text.slice(0, end)
  }

  /** Return what was held back, at the end of the text. */
  flush() {
    return this.stopped ? "" : this.held.slice(0, this.find(this.held))
  }

  /** Return where the first stop string begins; the length of the text if there is none. */
  find(text) {
    return Math.min(text.length, ...this.stops.map((stop) => text.indexOf(stop)).filter((at) => at >= 0))
  }
}
