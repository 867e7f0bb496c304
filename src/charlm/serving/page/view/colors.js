// Colours of values. All are translucent, so they suit the light and the dark theme.

const ORANGE = "226, 104, 34",
  BLUE = "44, 120, 226",
  RED = "222, 60, 46",
  AMBER = "240, 160, 20"

/** Return the colour of a value from -1 (blue) to 1 (orange). */
function divergingColor(value) {
  return `rgba(${value < 0 ? BLUE : ORANGE}, ${strength(Math.abs(value))})`
}

/** Return the colour of a surprise in nats. 5.5 nats (8 bits) get the full colour. */
function surpriseColor(nats) {
  return Number.isFinite(nats) ? `rgba(${RED}, ${strength(nats / 5.5)})` : ""
}

function influenceColor(value) {
  return `rgba(${AMBER}, ${(0.95 * Math.min(1, value)).toFixed(2)})`
}

function strength(value) {
  return (0.78 * Math.min(1, value)).toFixed(2)
}
