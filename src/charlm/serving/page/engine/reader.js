// Read a text symbol by symbol: the loss of each symbol, and the most probable symbols at each place.

const NUM_TOP = 8
// The distance of two saved states. After an edit, reading goes on from the last one before it.
const STATE_EVERY = 32

class Reader {
  constructor(model) {
    this.model = model
    this.ids = []
    this.nats = []
    this.top = [] // Before each symbol, and after the last one: [[id, probability], ...].
    this.saved = [] // saved[k] is the place before symbol k * STATE_EVERY.
    this.place = null // After the symbols that have been read: the state, and the costs of the symbols that may follow.
  }

  /** Begin to read a text. What it shares with the text before stays. Returns the number of symbols that are read already. */
  start(ids) {
    let shared = 0
    while (shared < ids.length && shared < this.nats.length && ids[shared] === this.ids[shared]) shared++
    this.ids = ids
    if (shared < this.nats.length) {
      // Read again from the last saved state.
      shared -= shared % STATE_EVERY
      this.place = copyPlace(this.saved[shared / STATE_EVERY])
      this.nats.length = shared
      this.top.length = shared ? shared + 1 : 0
      this.saved.length = shared / STATE_EVERY
    }
    if (!this.nats.length) {
      const { state, logits } = this.model.begin(ids)
      this.place = { state, costs: logits && negativeLogProbabilities(logits) }
    }
    return this.nats.length
  }

  /** Whether all symbols are read. */
  get finished() {
    return this.nats.length === this.ids.length
  }

  /** Read the next symbol. */
  step() {
    const at = this.nats.length
    if (at % STATE_EVERY === 0) this.saved.push(copyPlace(this.place))
    const { state, costs: before } = this.place
    this.nats.push(before ? before[this.ids[at]] : NaN) // Nothing predicts the first symbol.
    if (!at) this.top.push(mostProbable(before))
    const costs = negativeLogProbabilities(this.model.step(this.ids[at], state))
    this.place = { state, costs }
    this.top.push(mostProbable(costs))
  }
}

/** Return the most probable symbols, [[id, probability], ...]; none if nothing is predicted. */
function mostProbable(costs) {
  return costs ? smallest(costs, NUM_TOP).map((id) => [id, Math.exp(-costs[id])]) : []
}

/** `costs` are never changed, so only the state is copied. */
function copyPlace({ state, costs }) {
  return { state: copyState(state), costs }
}
