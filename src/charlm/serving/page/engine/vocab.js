// The vocabulary: text to ids and back. `charlm/data/vocab.py` defines the same maps.

const UNKNOWN = "\ufffd"

class Vocab {
  /** `documents` are {separator, boundary} as in `charlm/data/documents.py`; null for one text. */
  constructor({ kind, symbols, unknown, lowercase, documents }) {
    Object.assign(this, { kind, lowercase, documents })
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

  /**
   * Return {chars, ids, ends, missing}: the characters of a text, its ids, after each character the number of ids until there, and
   * the indices of the characters that the model cannot read. A separator of documents is one boundary, at its first character.
   */
  encode(text) {
    const chars = Array.from(text.replace(/\r\n?/g, "\n"))
    let lowered = Array.from(this.normalise(text))
    if (lowered.length !== chars.length) lowered = chars.map((char) => this.normalise(char))
    const ids = [],
      ends = [],
      missing = new Set()
    const { separator, boundary } = this.documents ?? {}
    const separating = separator === boundary ? [] : Array.from(separator)
    while (ends.length < lowered.length) {
      const at = ends.length,
        before = ids.length
      if (separating.length && separating.every((char, k) => lowered[at + k] === char)) {
        ids.push(...this.idsOf(boundary))
        ends.push(...separating.map(() => ids.length))
      } else {
        for (const char of lowered[at]) ids.push(...this.idsOf(char))
        if (ids.length === before) missing.add(at)
        ends.push(ids.length)
      }
    }
    return { chars, ids, ends, missing }
  }

  /** Return a function from the next ids to text. It holds back an incomplete character. */
  decoder() {
    if (this.kind !== "bytes") return (ids) => ids.map((id) => this.symbols[id]).join("")
    const decoder = new TextDecoder("utf-8", { ignoreBOM: true })
    return (ids) => decoder.decode(Uint8Array.from(ids), { stream: true })
  }

  /** Return the ids from which a sample starts. Throws an Error if the prompt ends a document. */
  encodePrompt(prompt) {
    if (!this.documents) return this.encode(prompt || this.startText()).ids
    const { separator, boundary } = this.documents
    const found = [separator, boundary].find((each) => this.normalise(prompt).includes(each))
    if (found) throw new Error(`The prompt must not contain ${JSON.stringify(found)}, which ends a document.`)
    return this.encode(boundary + prompt).ids
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
