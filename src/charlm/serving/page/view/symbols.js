// How characters are shown. A control character is shown by its name, so it cannot change how the text around it is drawn.

const CONTROL = /[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Cn}\p{Zl}\p{Zp}]/u

function codePoint(char) {
  return `U+${char.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`
}

/** Return whether a character is drawn by its code point. */
function isControl(char) {
  return char !== "\n" && char !== "\t" && CONTROL.test(char)
}

/** Return a character as a visible text, for a table. */
function visible(char) {
  const named = { "\n": "⏎", "\t": "⇥", " ": "␣" }
  return named[char] ?? (isControl(char) ? codePoint(char) : char)
}
