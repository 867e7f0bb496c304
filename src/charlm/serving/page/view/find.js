// Which units are on in a span and off around it, and where else they are on (as in LSTMVis, Strobelt et al. 2018).

// A unit is on where it has this fraction of its largest magnitude, with the sign that it has in the span.
const ON = 0.3
// How many characters before and after the span count as around it.
const AROUND = 10
const NUM_UNITS = 8, NUM_PLACES = 12

/**
 * Return {units, places}.
 *
 * units: [{unit, sign, within, around}], the units that are on in all of the span, those first whose mean falls most around it.
 * places: [{start, end, share}], other spans in which most of these units are on; share is the mean share of units that are on.
 */
function findAlike(activations, name, [start, end]) {
  const length = activations.chars.length
  const before = Math.max(0, start - AROUND), after = Math.min(length, end + AROUND)
  const found = []
  for (let unit = 0; unit < activations.units(name); unit++) {
    const values = activations.unit(name, unit)
    const largest = values.reduce((most, value) => Math.max(most, Math.abs(value)), 0)
    if (!largest) continue
    const sign = values[start] < 0 ? -1 : 1
    let within = 0, around = 0, isOn = true
    for (let i = before; i < after; i++) {
      const relative = (sign * values[i]) / largest
      if (i < start || i >= end) around += relative
      else {
        within += relative
        isOn &&= relative >= ON
      }
    }
    if (!isOn) continue
    within /= end - start
    around /= Math.max(1, after - before - (end - start))
    found.push({ unit, sign, within, around, values, largest })
  }
  found.sort((a, b) => b.within - b.around - (a.within - a.around))
  const units = found.filter(({ within, around }) => within - around > 0.1).slice(0, NUM_UNITS)
  return { units, places: placesOf(units, length, [start, end]) }
}

/** Return the other runs of characters at which at least three quarters of the units are on. */
function placesOf(units, length, [start, end]) {
  if (!units.length) return []
  const shares = new Float32Array(length)
  for (const { values, largest, sign, within } of units) {
    for (let i = 0; i < length; i++) if ((sign * values[i]) / largest >= Math.max(ON, within / 2)) shares[i] += 1 / units.length
  }
  const places = []
  for (let i = 0; i < length; i++) {
    if (shares[i] < 0.74) continue
    const first = i
    let sum = 0
    while (i < length && shares[i] >= 0.74) sum += shares[i++]
    if (i <= start || first >= end) places.push({ start: first, end: i, share: sum / (i - first) })
  }
  // Prefer long runs in which all units are on, up to the length of the span.
  const worth = (place) => place.share * Math.min(1, (place.end - place.start) / (end - start))
  return places.sort((a, b) => worth(b) - worth(a) || a.start - b.start).slice(0, NUM_PLACES)
}
