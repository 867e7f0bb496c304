// JAX's random numbers: the hash threefry2x32 (Salmon et al. 2011), keys, and Gumbel noise.

const ROTATIONS = [
  [13, 15, 26, 6],
  [17, 29, 16, 24],
]

/** Return two hashed 32-bit words of the counters (x0, x1) under the key (k0, k1). */
function threefry2x32([k0, k1], x0, x1) {
  const keys = [k0 | 0, k1 | 0, k0 ^ k1 ^ 0x1bd11bda]
  let a = (x0 + keys[0]) | 0,
    b = (x1 + keys[1]) | 0
  for (let round = 0; round < 5; round++) {
    for (const rotation of ROTATIONS[round % 2]) {
      a = (a + b) | 0
      b = ((b << rotation) | (b >>> (32 - rotation))) ^ a
    }
    a = (a + keys[(round + 1) % 3]) | 0
    b = (b + keys[(round + 2) % 3] + round + 1) | 0
  }
  return [a >>> 0, b >>> 0]
}

/** Return `jax.random.key(seed)` for a seed below 2^32. */
function keyOf(seed) {
  return [0, seed >>> 0]
}

/** Return `jax.random.fold_in(key, number)`. */
function foldIn(key, number) {
  return threefry2x32(key, 0, number)
}

/** Return `jax.random.gumbel(key, (size,))` with jax_threefry_partitionable, which is JAX's default. */
function gumbel(key, size) {
  const noise = new Float32Array(size)
  for (let i = 0; i < size; i++) {
    const [a, b] = threefry2x32(key, 0, i)
    const uniform = Math.max(((a ^ b) >>> 9) * 2 ** -23, 2 ** -126)
    noise[i] = -Math.log(Math.fround(-Math.log(uniform)))
  }
  return noise
}
