// Record what the model holds at every symbol of a text, in the form in which the page stores the given text.

/** Yield the number of symbols that are read; return {name: {data, shape: [units, symbols]}}, float32, with unit after unit. */
function* record(model, ids) {
  const arrays = {}
  const { state } = model.begin(ids)
  model.layers.forEach(({ cell, hidden }, k) => {
    for (const name of [...cell.carries, ...cell.gates.map((gate) => `gate_${gate}`)]) {
      arrays[`layer_${k}.${name}`] = { data: new Float32Array(hidden * ids.length), shape: [hidden, ids.length] }
    }
  })
  for (let t = 0; t < ids.length; t++) {
    model.step(ids[t], state)
    model.layers.forEach(({ cell, hidden, gates }, k) => {
      const copy = (name, values) => {
        const { data } = arrays[`layer_${k}.${name}`]
        for (let j = 0; j < hidden; j++) data[j * ids.length + t] = values[j]
      }
      for (const name of cell.carries) copy(name, state[k][name])
      for (const name of cell.gates) copy(`gate_${name}`, gates[name])
    })
    yield t + 1
  }
  return arrays
}
