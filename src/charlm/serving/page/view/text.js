// A text of which every character has a colour, a cursor and a brush: by mouse, by touch, and by keyboard.

// The least number of characters in a block.
const BLOCK = 300

class TextView {
  /**
   * `element` becomes the text. Listeners: onPoint(place or null) when the mouse or the cursor is on another character, and
   * onBrush([start, end] or null) when a span is brushed.
   */
  constructor(element, { onPoint = () => {}, onBrush = null } = {}) {
    Object.assign(this, { element, onPoint, onBrush, spans: [], chars: [], cursor: null, brush: null, anchor: null })
    // Only the blocks in view are coloured at once, the others when they come into view.
    this.visible = new Set()
    this.observer = new IntersectionObserver((entries) => this.onVisible(entries), { root: element, rootMargin: "100px" })
    element.classList.add("text")
    element.tabIndex = 0
    element.addEventListener("keydown", (event) => this.onKey(event))
    element.addEventListener("pointermove", (event) => this.onMove(event))
    element.addEventListener("pointerleave", () => this.onPoint(this.cursor))
    element.addEventListener("pointerdown", (event) => this.onDown(event))
    window.addEventListener("pointerup", () => this.onUp())
    window.addEventListener("pointercancel", () => this.onCancel())
  }

  /** Show characters. Some lines together are a block, so the browser need not draw those that are not in view. */
  setChars(chars) {
    this.chars = chars
    this.spans = chars.map((char, i) => {
      const span = document.createElement("span")
      if (char === "\n") span.className = "newline"
      else if (isControl(char)) span.className = "control"
      span.textContent = char === "\n" ? "⏎\n" : isControl(char) ? codePoint(char) : char
      span.place = i
      return span
    })
    const blocks = []
    for (let start = 0, end = 0; end < chars.length; start = end) {
      do end++
      while (end < chars.length && (chars[end - 1] !== "\n" || end - start < BLOCK))
      const block = make("div", { className: "block" })
      block.append(...this.spans.slice(start, end))
      blocks.push(block)
    }
    this.element.replaceChildren(...blocks)
    this.observer.disconnect()
    this.visible.clear()
    for (const block of blocks) this.observer.observe(block)
  }

  onVisible(entries) {
    for (const { target, isIntersecting } of entries) {
      if (isIntersecting) this.visible.add(target)
      else this.visible.delete(target)
      if (isIntersecting) this.paintBlock(target)
    }
  }

  /** Colour the characters: colorOf(place) is a CSS colour. */
  paint(colorOf) {
    this.colorOf = colorOf
    for (const block of this.visible) this.paintBlock(block)
  }

  paintBlock(block) {
    if (block.colorOf === this.colorOf) return
    block.colorOf = this.colorOf
    for (const span of block.children) span.style.backgroundColor = this.colorOf(span.place)
  }

  setCursor(place, scroll = false) {
    if (this.cursor !== null) this.spans[this.cursor]?.classList.remove("cursor")
    this.cursor = place
    if (place === null) return
    this.spans[place].classList.add("cursor")
    if (scroll) this.spans[place].scrollIntoView({ block: "nearest" })
    this.onPoint(place)
  }

  setBrush(brush) {
    if (this.brush) for (let i = this.brush[0]; i < this.brush[1]; i++) this.spans[i]?.classList.remove("brushed")
    this.brush = brush
    if (brush) for (let i = brush[0]; i < brush[1]; i++) this.spans[i].classList.add("brushed")
  }

  /** Show a span as if it had been brushed, and scroll to it. */
  goTo([start, end]) {
    this.setCursor(start)
    this.spans[start].scrollIntoView({ block: "center" })
    for (let i = start; i < end; i++) {
      this.spans[i].classList.remove("found")
      void this.spans[i].offsetWidth // Restart the animation.
      this.spans[i].classList.add("found")
    }
  }

  placeOf(event) {
    // All events of a touch have the target of the first one.
    const target = event.pointerType === "touch" ? document.elementFromPoint(event.clientX, event.clientY) : event.target
    return target?.place
  }

  onMove(event) {
    const place = this.placeOf(event)
    if (place === undefined) return
    if (this.anchor !== null && this.onBrush && (this.dragged ||= place !== this.anchor)) {
      this.setBrush([Math.min(this.anchor, place), Math.max(this.anchor, place) + 1])
    }
    if (place !== this.pointed) this.onPoint(place)
    this.pointed = place
  }

  onDown(event) {
    const place = this.placeOf(event)
    if (place === undefined || event.button) return
    if (event.shiftKey && this.cursor !== null && this.onBrush) {
      this.setBrush([Math.min(this.cursor, place), Math.max(this.cursor, place) + 1])
      this.onBrush(this.brush)
      return
    }
    this.setCursor(place)
    this.anchor = place
    this.dragged = false
    if (event.pointerType === "touch") return
    event.preventDefault()
    this.element.focus({ preventScroll: true })
  }

  /** The browser scrolls: a touch was no brush. */
  onCancel() {
    if (this.anchor !== null && this.brush) this.setBrush(null)
    this.anchor = null
  }

  /** The end of a drag is a brush. A click removes the brush. */
  onUp() {
    if (this.anchor === null) return
    this.anchor = null
    if (!this.onBrush || !(this.dragged || this.brush)) return
    if (!this.dragged) this.setBrush(null)
    this.onBrush(this.brush)
  }

  onKey(event) {
    if (event.key === "Escape" && this.brush && this.onBrush) {
      this.setBrush(null)
      this.onBrush(null)
      return
    }
    const at = this.cursor ?? 0
    const step = { ArrowLeft: -1, ArrowRight: 1, Home: -at, End: this.chars.length, ArrowUp: null, ArrowDown: null }[event.key]
    if (step === undefined || !this.chars.length || event.ctrlKey || event.metaKey || event.altKey) return
    event.preventDefault()
    const to = step === null ? this.lineAway(at, event.key === "ArrowUp" ? -1 : 1) : at + step
    const place = Math.max(0, Math.min(this.chars.length - 1, to))
    if (event.shiftKey && this.onBrush) {
      const fixed = this.brush ? (this.brush[0] === at ? this.brush[1] - 1 : this.brush[0]) : at
      this.setBrush([Math.min(fixed, place), Math.max(fixed, place) + 1])
      this.onBrush(this.brush)
    }
    this.setCursor(place, true)
  }

  /** Return the place one drawn line above or below another. */
  lineAway(at, direction) {
    const box = this.spans[at].getBoundingClientRect()
    for (let i = at + direction; i >= 0 && i < this.spans.length; i += direction) {
      const other = this.spans[i].getBoundingClientRect()
      const another = direction > 0 ? other.top > box.top + 2 : other.top < box.top - 2
      if (another && (direction > 0 ? other.left >= box.left - 1 || this.chars[i] === "\n" : other.left <= box.left + 1))
        return i
    }
    return direction > 0 ? this.chars.length - 1 : 0
  }
}
