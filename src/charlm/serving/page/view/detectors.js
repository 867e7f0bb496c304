// Detectors: functions from the characters of a text to one number for each character. A unit may follow them.

/** Return a detector that counts the characters since one for which `starts(chars, i)` is true. */
function counter(starts) {
  return (chars) => {
    let count = 0
    return Float32Array.from(chars, (_, i) => (count = starts(chars, i) ? 0 : count + 1))
  }
}

function test(pattern) {
  return (chars) => Float32Array.from(chars, (char) => (pattern.test(char) ? 1 : 0))
}

/** Return 1 from each opening character up to the character before its closing one. */
function inside(pairs) {
  return (chars) => {
    const open = []
    return Float32Array.from(chars, (char, i) => {
      if (open.length && char === open.at(-1)) open.pop()
      else if (char in pairs) open.push(pairs[char])
      // A quotation that is never closed ends with its paragraph.
      if (char === "\n" && chars[i - 1] === "\n") open.length = 0
      return open.length ? 1 : 0
    })
  }
}

/** Return 1 in all matches of a regular expression. */
function matching(pattern) {
  return (chars) => {
    const found = new Float32Array(chars.length)
    // Places in a string count UTF-16 code units, and chars are code points.
    const place = []
    chars.forEach((char, i) => {
      for (let k = 0; k < char.length; k++) place.push(i)
    })
    for (const match of chars.join("").matchAll(pattern)) {
      for (let k = match.index; k < match.index + match[0].length; k++) found[place[k]] = 1
    }
    return found
  }
}

const LETTER = /\p{L}/u

/** [key, label, detector] */
const DETECTORS = [
  ["line", "position in the line", counter((chars, i) => chars[i] === "\n")],
  ["word", "position in the word", counter((chars, i) => !LETTER.test(chars[i]))],
  ["paragraph", "since the last blank line", counter((chars, i) => chars[i] === "\n" && chars[i - 1] === "\n")],
  ["line_end", "line ends", test(/\n/)],
  ["space", "spaces", test(/ /)],
  ["upper", "upper case", test(/\p{Lu}/u)],
  ["vowel", "vowels", test(/[aeiou]/i)],
  ["punctuation", "punctuation", test(/\p{P}/u)],
  ["speaker", "speaker names", matching(/^\p{Lu}[\p{L} .'’-]{0,30}:$/gmu)],
  ["quotes", "inside quotes", inside({ '"': '"', "“": "”", "‘": "’", "«": "»" })],
  ["brackets", "inside brackets", inside({ "(": ")", "[": "]", "{": "}", "<": ">" })],
]

/** Return the detector of a regular expression that the user writes. Throws SyntaxError if it is none. */
function detectorOf(expression) {
  return matching(new RegExp(expression, "gmu"))
}
