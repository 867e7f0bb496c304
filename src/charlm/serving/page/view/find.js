// Which units are on in a span and off around it, and where else they are on (as in LSTMVis, Strobelt et al. 2018).

// A unit is on where it has this fraction of its largest magnitude, with the sign that it has in the span.
const ON = 0.25
// A unit that is on in this fraction of the span is on in the span.
const MOST = 0.75
// How many characters before and after the span count as around it.
const AROUND = 10
const NUM_UNITS = 8,
  NUM_PLACES = 12

/**
 * Return {units, places}.
 *
 * units: [{unit, sign, within, around}], the units that are on in the span, those first whose mean falls most around it. Means
 * are relative to the largest magnitude of the unit.
 * places: [{start, end, score}], spans of the same length in which these units are on, and off around them.
 */
function findAlike(activations, name, span) {
  const [start, end] = span
  const found = []
  for (let unit = 0; unit < activations.units(name); unit++) {
    const values = activations.unit(name, unit)
    const largest = activations.largest(name, values)
    let inSpan = 0
    for (let i = start; i < end; i++) inSpan += values[i]
    const factor = (inSpan < 0 ? -1 : 1) / largest
    let on = 0
    for (let i = start; i < end; i++) on += factor * values[i] >= ON
    if (on < MOST * (end - start)) continue
    const relative = values.map((value) => factor * value)
    found.push({ unit, sign: Math.sign(factor), relative, ...meansAround(sumsOf(relative), span) })
  }
  found.sort((a, b) => b.within - b.around - (a.within - a.around))
  const units = found.filter(({ within, around }) => within - around > 0.1).slice(0, NUM_UNITS)
  return { units, places: placesOf(units, activations.chars.length, span) }
}

/** Return the sums of the first 0, 1, 2, ... values. */
function sumsOf(values) {
  const sums = new Float64Array(values.length + 1)
  for (let i = 0; i < values.length; i++) sums[i + 1] = sums[i] + values[i]
  return sums
}

/** Return the mean of the values within a span, and that of the values around it. */
function meansAround(sums, [start, end]) {
  const first = Math.max(0, start - AROUND),
    last = Math.min(sums.length - 1, end + AROUND)
  const within = sums[end] - sums[start],
    all = sums[last] - sums[first]
  return { within: within / (end - start), around: (all - within) / Math.max(1, last - first - (end - start)) }
}

/** Return the other spans, without overlaps, in which most units are on and around which fewer are. */
function placesOf(units, length, [start, end]) {
  if (!units.length) return []
  const shares = new Float32Array(length)
  for (const { relative, within } of units) {
    const enough = Math.max(ON, within / 2)
    for (let i = 0; i < length; i++) if (relative[i] >= enough) shares[i] += 1 / units.length
  }
  const sums = sumsOf(shares)
  const candidates = []
  for (let first = 0; first + end - start <= length; first++) {
    const last = first + end - start
    const { within, around } = meansAround(sums, [first, last])
    if (within >= 0.6 && within > around && (last <= start || first >= end))
      candidates.push({ start: first, end: last, score: within - around })
  }
  candidates.sort((a, b) => b.score - a.score || a.start - b.start)
  const places = []
  for (const each of candidates) {
    if (places.length === NUM_PLACES) break
    if (places.every((other) => each.end <= other.start || each.start >= other.end)) places.push(each)
  }
  return places
}
