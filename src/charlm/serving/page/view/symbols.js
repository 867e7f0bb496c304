// How characters are shown. A control character is shown by its name, so it cannot change how the text around it is drawn.

const CONTROL = /[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Cn}\p{Zl}\p{Zp}]/u

function codePoint(char) {
  return `U+${char.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`
}

/** Return whether a character is drawn by its code point. */
function isControl(char) {
  return char !== "\n" && char !== "\t" && CONTROL.test(char)
}

/** Return a text as nodes, with control characters by their code points. */
function shown(text) {
  const nodes = []
  for (const char of text) {
    if (isControl(char)) nodes.push(make("span", { className: "control" }, codePoint(char)))
    else if (typeof nodes.at(-1) === "string") nodes.push(nodes.pop() + char)
    else nodes.push(char)
  }
  return nodes
}

/** Return a character as a visible text, for a table. */
function visible(char) {
  const named = { "\n": "⏎", "\t": "⇥", " ": "␣" }
  return named[char] ?? (isControl(char) ? codePoint(char) : char)
}
