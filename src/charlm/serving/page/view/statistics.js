// Correlations, histograms and saturation.

/** Return the Pearson correlation of each unit of an array with a detector, [{unit, r}], the strongest first. */
function rankUnits(activations, name, detected) {
  const n = detected.length
  const mean = detected.reduce((sum, value) => sum + value, 0) / n
  const centred = Float64Array.from(detected, (value) => value - mean)
  const spread = Math.sqrt(centred.reduce((sum, value) => sum + value * value, 0))
  const found = []
  for (let unit = 0; unit < activations.units(name); unit++) {
    const values = activations.unit(name, unit)
    let sum = 0,
      squares = 0,
      product = 0
    for (let i = 0; i < n; i++) {
      sum += values[i]
      squares += values[i] * values[i]
      product += values[i] * centred[i]
    }
    const norm = spread * Math.sqrt(Math.max(0, squares - (sum * sum) / n))
    found.push({ unit, r: norm > 1e-12 ? product / norm : 0 })
  }
  return found.sort((a, b) => Math.abs(b.r) - Math.abs(a.r) || a.unit - b.unit)
}

/** Return whether the detector is on, for each character: above 0 if it has two values, otherwise above its median. */
function isOn(detected) {
  const sorted = Float32Array.from(detected).sort()
  const twoValued = detected.every((value) => value === 0 || value === 1)
  const threshold = twoValued ? 0 : sorted[sorted.length >> 1]
  return { on: Array.from(detected, (value) => value > threshold), threshold, twoValued }
}

/** Return the fractions of the values in `bins` equal bins from low to high, for the characters where on and where off. */
function histogram(values, on, low, high, bins) {
  const counts = { on: new Float64Array(bins), off: new Float64Array(bins) }
  const totals = { on: 0, off: 0 }
  values.forEach((value, i) => {
    const side = on[i] ? "on" : "off"
    counts[side][Math.max(0, Math.min(bins - 1, Math.floor(((value - low) / (high - low)) * bins)))]++
    totals[side]++
  })
  for (const side of ["on", "off"]) for (let k = 0; k < bins; k++) counts[side][k] /= totals[side] || 1
  return counts
}

/** Return how often each unit of a gate is below 0.1 and above 0.9 (Karpathy et al. 2015), [{unit, left, right}]. */
function saturation(activations, name) {
  const found = []
  for (let unit = 0; unit < activations.units(name); unit++) {
    const values = activations.unit(name, unit)
    let left = 0,
      right = 0
    for (const value of values) {
      if (value < 0.1) left++
      else if (value > 0.9) right++
    }
    found.push({ unit, left: left / values.length, right: right / values.length })
  }
  return found
}
