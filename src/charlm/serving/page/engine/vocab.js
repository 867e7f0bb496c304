// The vocabulary: text to ids and back. `charlm/data/vocab.py` defines the same maps.

const UNKNOWN = "\ufffd"

class Vocab {
  constructor({ kind, symbols, unknown, lowercase }) {
    this.kind = kind
    this.lowercase = lowercase
    this.symbols = kind === "bytes" ? null : Array.from(symbols)
    this.size = kind === "bytes" ? 256 : this.symbols.length
    this.ids = new Map((this.symbols ?? []).map((symbol, id) => [symbol, id]))
    this.other = unknown ? this.ids.get(UNKNOWN) : undefined
  }

  /** Return a text as the model reads it: line ends are LF, and the text is lower case if that of the run was. */
  normalise(text) {
    text = text.replace(/\r\n?/g, "\n")
    return this.lowercase ? text.toLowerCase() : text
  }

  /** Return the ids of a character: one, or up to four bytes; none if the model cannot read it. */
  idsOf(char) {
    if (this.kind === "bytes") return Array.from(new TextEncoder().encode(char))
    const id = this.ids.get(char) ?? this.other
    return id === undefined ? [] : [id]
  }

  /** Return {chars, ids, ends}: the characters of a text, its ids, and after each character the number of ids until there. */
  encode(text) {
    const chars = Array.from(text.replace(/\r\n?/g, "\n"))
    let lowered = Array.from(this.normalise(text))
    if (lowered.length !== chars.length) lowered = chars.map((char) => this.normalise(char))
    const ids = [],
      ends = []
    for (const each of lowered) {
      for (const char of each) ids.push(...this.idsOf(char))
      ends.push(ids.length)
    }
    return { chars, ids, ends }
  }

  /** Return a function from the next ids to text. It holds back an incomplete character. */
  decoder() {
    if (this.kind !== "bytes") return (ids) => ids.map((id) => this.symbols[id]).join("")
    const decoder = new TextDecoder("utf-8", { ignoreBOM: true })
    return (ids) => decoder.decode(Uint8Array.from(ids), { stream: true })
  }

  /** Return the text after which a text without a prompt starts. */
  startText() {
    return this.kind === "bytes" || this.ids.has("\n") ? "\n" : this.symbols[0]
  }

  /** Return a symbol as a text: a character, or a byte in hexadecimal digits if it is not ASCII. */
  nameOf(id) {
    if (this.kind !== "bytes") return this.symbols[id]
    return id < 128 ? String.fromCharCode(id) : `0x${id.toString(16)}`
  }
}
