// Read: a text of one's own, coloured by its surprise while it is typed. The most probable next symbols stand beside it.

const MOST_READ = 20_000

class ReadPanel {
  constructor(engine, vocab, onRead) {
    Object.assign(this, {
      engine,
      vocab,
      onRead,
      nats: [],
      top: [],
      encoded: { chars: [], ids: [], ends: [], missing: new Set() },
      spans: [],
      drawn: [],
      lines: [],
    })
    this.input = byId("read-input")
    this.input.maxLength = MOST_READ
    this.backdrop = byId("read-backdrop")
    this.input.addEventListener("input", () => this.update())
    this.input.addEventListener("scroll", () => (this.backdrop.scrollTop = this.input.scrollTop))
    this.input.addEventListener("pointermove", (event) => this.point(this.placeAt(event)))
    this.input.addEventListener("pointerleave", () => this.point(null))
    for (const name of ["keyup", "click"]) this.input.addEventListener(name, () => this.point(null))
    this.update()
  }

  /** Read the text of the input. What was read of it before stays. */
  update() {
    const before = this.encoded.ids
    this.encoded = this.vocab.encode(this.input.value)
    const { ids } = this.encoded
    let known = 0
    while (known < Math.min(this.nats.length, ids.length) && ids[known] === before[known]) known++
    this.nats.length = known
    this.draw(Array.from(this.input.value))
    this.showMissing()
    this.running?.cancel()
    const running = this.engine.ask("read", { text: this.input.value, known }, (piece) => {
      if (this.running === running) this.receive(piece)
    })
    this.running = running
    running.catch((error) => (byId("read-status").textContent = error.message))
  }

  /** Make the characters behind the input equal to those in it. Each line is a block, so the browser lays out only new lines. */
  draw(chars) {
    let same = 0
    while (same < chars.length && this.drawn[same] === chars[same]) same++
    while (this.lines.length && this.lines.at(-1).start >= same) this.lines.pop().block.remove()
    for (const span of this.spans.splice(same)) span.remove()
    for (let i = same; i < chars.length; i++) {
      if (!this.lines.length || chars[i - 1] === "\n") {
        this.lines.push({ start: i, block: this.backdrop.insertBefore(document.createElement("div"), this.backdrop.lastChild) })
      }
      const span = document.createElement("span")
      span.textContent = chars[i]
      if (this.encoded.missing.has(i)) span.className = "missing"
      this.spans.push(span)
      this.lines.at(-1).block.append(span)
    }
    this.drawn = chars
  }

  showMissing() {
    const { chars, missing: places } = this.encoded
    const missing = [...new Set(chars.filter((_, i) => places.has(i)))].map(visible)
    byId("read-missing").textContent = missing.length
      ? `The model has no symbol for ${missing.slice(0, 8).join(" ")}${missing.length > 8 ? " …" : ""} and reads on without ${missing.length > 1 ? "them" : "it"}.`
      : ""
  }

  receive({ from, nats, top }) {
    this.nats.length = from
    this.nats.push(...nats)
    this.top.length = from
    this.top.push(...top)
    const { ends } = this.encoded
    for (let i = 0; i < this.spans.length; i++) {
      if (ends[i] > from) this.spans[i].style.backgroundColor = ends[i] <= this.nats.length ? surpriseColor(this.cost(i)) : ""
    }
    this.showScore()
    if (!this.pointing) this.point(null)
  }

  /** Return the nats of a character, over all its symbols. */
  cost(i) {
    const { ends } = this.encoded
    let sum = 0
    for (let k = i ? ends[i - 1] : 0; k < ends[i]; k++) sum += this.nats[k]
    return sum
  }

  showScore() {
    const known = this.nats.filter(Number.isFinite)
    const sum = known.reduce((total, each) => total + each, 0)
    const { chars, ends, ids } = this.encoded
    const read = ends.filter((end, i) => end > (i ? ends[i - 1] : 0) && end <= this.nats.length).length
    // Nothing predicts the first symbol of a text, so its first character does not count. A document begins after a boundary.
    const scored = read - !Number.isFinite(this.nats[0])
    byId("read-score").textContent = scored > 0 ? (sum / scored).toFixed(3) : "–"
    byId("read-bits").textContent = scored > 0 ? `${(sum / scored / Math.LN2).toFixed(3)} bits` : ""
    byId("read-status").textContent =
      this.nats.length < ids.length
        ? `reading: ${this.nats.length.toLocaleString("en")} of ${ids.length.toLocaleString("en")} symbols`
        : `${chars.length.toLocaleString("en")} characters${this.input.value.length >= MOST_READ ? ", the most that this page reads" : ""}`
    if (this.nats.length === ids.length) this.onRead()
  }

  placeAt(event) {
    // The input covers its characters, so their boxes are searched line by line.
    const { clientX: x, clientY: y } = event
    let low = 0,
      high = this.spans.length - 1
    while (low < high) {
      const middle = (low + high) >> 1
      const box = this.spans[middle].getBoundingClientRect()
      if (box.bottom < y || (box.top <= y && box.right < x)) low = middle + 1
      else high = middle
    }
    const box = this.spans[low]?.getBoundingClientRect()
    return box && box.top <= y && box.bottom >= y && box.left <= x + 1 && box.right >= x - 1 ? low : null
  }

  /** Show the prediction of the character at a place, or of what follows the caret. */
  point(place) {
    this.pointing = place !== null
    const { chars, ends } = this.encoded
    const caret = Array.from(this.input.value.slice(0, this.input.selectionStart)).length
    const at = place ?? caret
    const first = at ? (ends[at - 1] ?? 0) : 0
    const title = byId("read-title")
    this.marked?.classList.remove("pointed")
    this.marked = place === null ? null : this.spans[place]
    this.marked?.classList.add("pointed")
    if (at < chars.length) {
      title.textContent =
        ends[at] > first && Number.isFinite(this.cost(at))
          ? `${visible(chars[at])} costs ${this.cost(at).toFixed(2)} nats: ${(100 * Math.exp(-this.cost(at))).toPrecision(3)} %`
          : `${visible(chars[at])}${Number.isNaN(this.nats[0]) && !at ? ": nothing predicts the first symbol" : ""}`
    } else title.textContent = chars.length ? "What comes next" : "Type or paste a text"
    const entries = this.top[first] ?? []
    const items = entries.map(([id, probability]) => {
      const isHere = at < chars.length && this.encoded.ids[first] === id
      const parts = barParts(visible(this.vocab.nameOf(id)), probability, `${(100 * probability).toFixed(1)} %`)
      return make("li", { className: isHere ? "here" : "" }, ...parts)
    })
    byId("read-next").replaceChildren(...items)
  }
}
