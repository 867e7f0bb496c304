// The page: its data, its tabs, and its panels.

const data = JSON.parse(byId("data").textContent)
const vocab = new Vocab(data.vocab)
const engine = new Engine()

/** Describe the model in the header. */
function showAbout({ name, cell, layers, hidden, symbols, parameters, steps, loss, source, dtype, lowered }) {
  document.title = name
  byId("name").replaceChildren(...shown(name))
  const count = (number, one, many = `${one}s`) => `${number.toLocaleString("en")} ${number === 1 ? one : many}`
  const facts = [
    `${layers > 1 ? `${layers} × ` : ""}${cell.toUpperCase().replace("LN_", "layer-normalised ").replaceAll("_", " ")} of ${count(hidden, "unit")}`,
    `${symbols} symbols`,
    count(parameters, "parameter"),
    `step ${steps.toLocaleString("en")}`,
  ]
  if (loss !== null) facts.push(`${loss.toFixed(3)} nats per character on validation text`)
  byId("facts").replaceChildren(...facts.map((fact) => make("li", {}, fact)))
  const notes = [`The text to look into is ${source}.`]
  if (dtype !== "float32")
    notes.push(`The weights of this page are ${dtype}, so its numbers differ slightly from those of charlm.`)
  if (lowered) notes.push(`charlm computes this model's products in ${lowered}; this page computes in float32.`)
  byId("notes").replaceChildren(...shown(notes.join(" ")))
}

/** Connect the tabs, with the arrow keys as in any list of tabs. */
function connectTabs() {
  const tabs = [...document.querySelectorAll("[role=tab]")]
  const show = (chosen, focus = false) => {
    for (const tab of tabs) {
      const isChosen = tab === chosen
      tab.setAttribute("aria-selected", isChosen)
      tab.tabIndex = isChosen ? 0 : -1
      byId(tab.getAttribute("aria-controls")).hidden = !isChosen
    }
    if (focus) chosen.focus()
  }
  tabs.forEach((tab, k) => {
    tab.addEventListener("click", () => show(tab))
    tab.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key]
      if (step) show(tabs[(k + step + tabs.length) % tabs.length], true)
    })
  })
  return (name) => show(byId(`tab-${name}`))
}

async function start() {
  const showTab = connectTabs()
  showAbout(data.about)
  const encoded = vocab.encode(data.text)
  const loaded = engine.ask("load", { model: data.model, vocab: data.vocab, weights: data.weights })
  const write = new WritePanel(engine, vocab, data)
  const given = new Activations(await unpack(data.activations), encoded, data.model.cell.logistic)
  const inside = new InsidePanel(given, (...held) => {
    write.addClamp(...held)
    showTab("write")
  })
  const { influence } = await unpack(data.influence)
  const matters = new MattersPanel(influence, encoded)
  await loaded
  const read = new ReadPanel(engine, vocab, () => (byId("inside-typed").disabled = !byId("read-input").value))
  const source = connectSource(inside, given, read)
  byId("sample-text").addEventListener("click", () => {
    byId("read-input").value = encoded.chars.slice(0, 600).join("")
    read.update()
    byId("read-input").focus()
  })
  // For tests and for the console.
  window.charlm = {
    data,
    vocab,
    engine,
    Engine,
    write,
    read,
    inside,
    matters,
    source,
    DETECTORS,
    detectorOf,
    rankUnits,
    saturation,
  }
  document.body.dataset.ready = "yes"
  write.start()
}

/** Let "Look inside" show the text of the page, or the text that was typed. */
function connectSource(inside, given, read) {
  const show = async () => {
    if (byId("inside-given").checked) return inside.setActivations(given)
    const note = byId("inside-note")
    const arrays = await engine.ask(
      "record",
      { text: byId("read-input").value },
      (pieces) => (note.textContent = `reading: ${Math.round(100 * pieces)} %`),
    )
    inside.setActivations(new Activations(arrays, vocab.encode(byId("read-input").value), data.model.cell.logistic))
  }
  for (const name of ["inside-given", "inside-typed"]) byId(name).addEventListener("change", show)
  return show
}

start().catch((error) => {
  byId("notes").textContent = `This browser cannot run the page: ${error.message}`
  throw error
})
