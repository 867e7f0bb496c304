// Typed arrays: how they are unpacked, and the product of a matrix with a vector.

/** Return the bytes of a base64 string. */
function fromBase64(text) {
  const binary = atob(text)
  const bytes = new Uint8Array(binary.length)
  for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i)
  return bytes
}

/** Return the arrays of a packed group, {name: {data, shape}}. `serving/packing.py` describes the format. */
async function unpack({ arrays, blob }) {
  const stream = new Blob([fromBase64(blob)]).stream().pipeThrough(new DecompressionStream("deflate"))
  const buffer = await new Response(stream).arrayBuffer()
  const found = {}
  let offset = 0
  for (const { name, dtype, shape } of arrays) {
    const size = shape.reduce((product, length) => product * length, 1)
    const Type = { float32: Float32Array, float16: Uint16Array, uint8: Uint8Array }[dtype]
    const end = offset + size * Type.BYTES_PER_ELEMENT
    const raw = new Type(buffer.slice(offset, end))
    found[name] = { data: dtype === "float16" ? fromFloat16(raw) : raw, shape }
    offset = end
  }
  return found
}

/** Return half-precision numbers, given as their bits, as Float32Array. */
function fromFloat16(bits) {
  const out = new Float32Array(bits.length)
  for (let i = 0; i < bits.length; i++) {
    const exponent = (bits[i] >> 10) & 31,
      fraction = bits[i] & 1023
    const sign = bits[i] >> 15 ? -1 : 1
    if (exponent === 0) out[i] = sign * fraction * 2 ** -24
    else if (exponent === 31) out[i] = fraction ? NaN : sign * Infinity
    else out[i] = sign * (1024 + fraction) * 2 ** (exponent - 25)
  }
  return out
}

/** Write W @ x to out, where W has `rows` rows. Four rows are read side by side, so x is read a quarter as often. */
function multiply(W, x, out, rows) {
  const columns = x.length,
    last = rows - (rows % 4)
  for (let row = 0; row < last; row += 4) {
    const p = row * columns,
      q = p + columns,
      r = q + columns,
      s = r + columns
    let a = 0,
      b = 0,
      c = 0,
      d = 0
    for (let k = 0; k < columns; k++) {
      const value = x[k]
      a += W[p + k] * value
      b += W[q + k] * value
      c += W[r + k] * value
      d += W[s + k] * value
    }
    out[row] = a
    out[row + 1] = b
    out[row + 2] = c
    out[row + 3] = d
  }
  for (let row = last; row < rows; row++) {
    let sum = 0
    for (let k = 0; k < columns; k++) sum += W[row * columns + k] * x[k]
    out[row] = sum
  }
}

function sigmoid(a) {
  return 1 / (1 + Math.exp(-a))
}

function logSigmoid(a) {
  return Math.min(a, 0) - Math.log1p(Math.exp(-Math.abs(a)))
}

/** Return -log of the probability of each symbol in nats, from logits. */
function negativeLogProbabilities(logits) {
  let largest = -Infinity
  for (const logit of logits) largest = Math.max(largest, logit)
  let sum = 0
  for (const logit of logits) sum += Math.exp(logit - largest)
  const logSum = largest + Math.log(sum)
  return Float64Array.from(logits, (logit) => logSum - logit)
}

/** Return the indices of the k smallest numbers, the smallest first. */
function smallest(numbers, k) {
  const found = []
  for (let i = 0; i < numbers.length; i++) {
    if (found.length === k && !(numbers[i] < numbers[found[k - 1]])) continue
    let at = found.length
    while (at > 0 && numbers[i] < numbers[found[at - 1]]) at--
    found.splice(at, 0, i)
    if (found.length > k) found.pop()
  }
  return found
}
