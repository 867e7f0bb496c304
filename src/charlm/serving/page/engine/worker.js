// The worker: it owns the model, and answers the page's requests {id, method, args} with {id, piece}, {id, result} or
// {id, error}. A request {cancel: id} ends an earlier one.

// A long computation pauses this often, in milliseconds, to hear of newer requests.
const SLICE = 12

let model, vocab, transitions, reader, sampleWindow
const cancelled = new Set()

/** Run a generator until it ends or the request is cancelled. `show` gets what was yielded since the last pause. */
async function runInSlices(generator, id, show) {
  let pieces = []
  for (;;) {
    const end = performance.now() + SLICE
    let step
    do {
      step = generator.next()
      if (!step.done) pieces.push(step.value)
    } while (!step.done && performance.now() < end)
    if (pieces.length) show(pieces)
    pieces = []
    if (step.done) return step.value
    await pause()
    if (cancelled.has(id)) return undefined
  }
}

/** Let the messages that have arrived be handled. A timer would wait for 4 ms. */
function pause() {
  return new Promise((resolve) => {
    const channel = new MessageChannel()
    channel.port1.onmessage = resolve
    channel.port2.postMessage(null)
  })
}

const METHODS = {
  /** Load a model. It takes the place of the one before. */
  async load({ model: description, vocab: symbols, weights }) {
    const arrays = await unpack(weights)
    model = new Model(description, arrays)
    vocab = new Vocab(symbols)
    transitions = arrays.utf8?.data
    sampleWindow = description.window
    reader = new Reader(model)
    return { size: vocab.size }
  },

  /** Return the logits after each symbol of a text, {logits: Float32Array of symbols times V}. */
  async logits({ text }) {
    const { ids } = vocab.encode(text)
    const { state } = model.begin(ids)
    const logits = new Float32Array(ids.length * vocab.size)
    ids.forEach((id, t) => logits.set(model.step(id, state), t * vocab.size))
    return { logits }
  },

  /** Continue a prompt; each piece is new text. `settings` are those of `generate`, and `stop`. */
  async write({ prompt, stop, ...settings }, id, show) {
    const decode = vocab.decoder(),
      finder = new StopFinder([stop, vocab.documents?.boundary].filter(Boolean))
    const ids = vocab.encodePrompt(prompt)
    if (ids.length < sampleWindow)
      throw new Error(`The model reads ${sampleWindow} symbols before each draw; write a longer prompt.`)
    function* stopping() {
      for (const drawn of generate(model, ids, { window: sampleWindow, ...settings }, transitions)) {
        yield drawn
        if (finder.stopped) return
      }
    }
    function* pieces() {
      for (const drawn of stopping()) yield finder.feed(decode([drawn]))
    }
    await runInSlices(pieces(), id, (found) => show(found.join("")))
    show(finder.flush())
    return { stopped: finder.stopped }
  },

  /**
   * Read a text. A piece is {from, nats, top}, for the symbols from a place on; top has one entry more. The page knows the first
   * `known` symbols already: pieces of a request that was cancelled may never have reached it.
   */
  async read({ text, known }, id, show) {
    const { ids } = vocab.encode(text)
    let from = Math.min(reader.start(ids), known)
    function* rest() {
      while (!reader.finished) yield reader.step()
    }
    const send = () => {
      show({ from, nats: reader.nats.slice(from), top: reader.top.slice(from) })
      from = reader.nats.length
    }
    if (reader.finished || from < reader.nats.length) send()
    await runInSlices(rest(), id, send)
    return { finished: reader.finished }
  },

  /** Return what the model holds at every symbol of a text; a piece is the fraction that is read. */
  async record({ text }, id, show) {
    const { ids } = vocab.encode(text)
    return runInSlices(record(model, ids), id, (done) => show(done.at(-1) / ids.length))
  },
}

onmessage = async ({ data: { id, method, args, cancel } }) => {
  if (cancel !== undefined) {
    cancelled.add(cancel)
    return
  }
  try {
    const result = await METHODS[method](args, id, (piece) => postMessage({ id, piece }))
    postMessage({ id, result })
  } catch (error) {
    postMessage({ id, error: error.message })
  }
  cancelled.delete(id)
}
