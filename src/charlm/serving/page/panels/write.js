// Write: the model continues a prompt. Units may be held at a value, and then two texts are drawn to be compared.

class WritePanel {
  constructor(engine, vocab, data) {
    Object.assign(this, { engine, vocab, data })
    const { sample, model } = data
    const number = (name, value, options = {}) =>
      make("input", { id: `write-${name}`, type: "number", value: value ?? "", ...options })
    this.controls = {
      prompt: make("textarea", {
        id: "write-prompt",
        rows: 3,
        value: sample.prompt ?? "",
        placeholder: vocab.documents ? "empty: a new document" : "empty: the text begins after a line end",
        spellcheck: false,
      }),
      temperature: number("temperature", sample.temperature, { min: 0.01, step: 0.05 }),
      top_k: number("top-k", sample.top_k, { min: 1, step: 1, placeholder: "all" }),
      top_p: number("top-p", sample.top_p, { min: 0.01, max: 1, step: 0.01, placeholder: "1" }),
      seed: number("seed", 0, { min: 0, max: 2 ** 32 - 1, step: 1 }),
      length: number("length", sample.length, { min: 1, max: 100000, step: 1 }),
      stop: make("input", { id: "write-stop", placeholder: "none, or \\n", spellcheck: false }),
      greedy: make("input", { id: "write-greedy", type: "checkbox", checked: sample.greedy }),
    }
    const c = this.controls
    this.button = make("button", { id: "write-go", className: "primary", onclick: () => this.toggle() }, "Write")
    const reseed = make("button", { title: "another seed", "aria-label": "another seed", onclick: () => this.another() }, "⟳")
    this.clampList = make("ul", { id: "clamps", className: "clamps" })
    this.clamps = []
    byId("write-controls").append(
      field("Prompt", c.prompt),
      make(
        "div",
        { className: "grid" },
        field("Temperature", c.temperature),
        field("Top-k", c.top_k),
        field("Top-p", c.top_p),
        field("Length", c.length),
        make(
          "label",
          { className: "field" },
          make("span", { className: "label" }, "Seed"),
          make("span", { className: "joined" }, c.seed, reseed),
        ),
        field("Stop before", c.stop),
      ),
      make("label", { className: "check" }, c.greedy, " always the most probable symbol"),
      this.clampEditor(model),
      make(
        "div",
        { className: "actions" },
        this.button,
        make("span", { id: "write-status", className: "hint", role: "status" }),
      ),
      make("p", { className: "hint same" }, "The same seed and settings give the text of python -m charlm.sample."),
    )
    for (const control of Object.values(c)) {
      control.addEventListener("keydown", (event) => {
        if (event.key === "Enter" && (event.ctrlKey || event.metaKey || control.tagName === "INPUT")) this.start()
      })
    }
  }

  clampEditor(model) {
    const { carries } = model.cell
    this.clampInputs = {
      layer: select(Array.from({ length: model.layers }, (_, k) => [k, `layer ${k}`])),
      name: select(carries.map((name) => [name, carryLabel(name)])),
      unit: make("input", { type: "number", min: 0, max: model.hidden - 1, value: 0, id: "clamp-unit" }),
      value: make("input", { type: "number", step: 0.1, value: 1, id: "clamp-value" }),
    }
    const { layer, name, unit, value } = this.clampInputs
    layer.id = "clamp-layer"
    name.id = "clamp-name"
    name.value = carries.includes("c") ? "c" : "h"
    const add = make(
      "button",
      {
        id: "clamp-add",
        onclick: () => this.addClamp(Number(layer.value), name.value, Number(unit.value), Number(value.value)),
      },
      "Hold",
    )
    const layerField = field("Layer", layer)
    layerField.hidden = model.layers < 2
    return make(
      "details",
      { id: "clamp", open: false },
      make("summary", {}, "Hold a unit at a value"),
      make(
        "p",
        { className: "hint" },
        "The unit keeps the value at every symbol, the prompt included. The text is drawn twice with the same seed, without and with it.",
      ),
      make("div", { className: "grid" }, layerField, field("State", name), field("Unit", unit), field("Value", value)),
      add,
      this.clampList,
    )
  }

  addClamp(layer, name, unit, value) {
    if (!(Number.isInteger(unit) && unit >= 0 && unit < this.data.model.hidden && Number.isFinite(value))) return
    this.clamps = this.clamps.filter((each) => !(each.layer === layer && each.name === name && each.unit === unit))
    this.clamps.push({ layer, name, unit, value })
    this.showClamps()
  }

  showClamps() {
    this.clampList.replaceChildren(
      ...this.clamps.map((clamp) =>
        make(
          "li",
          {},
          `${this.data.model.layers > 1 ? `layer ${clamp.layer}, ` : ""}${clamp.name}, unit ${clamp.unit} = ${clamp.value} `,
          make(
            "button",
            {
              className: "small",
              "aria-label": "remove",
              onclick: () => {
                this.clamps = this.clamps.filter((each) => each !== clamp)
                this.showClamps()
              },
            },
            "×",
          ),
        ),
      ),
    )
    byId("clamp").open ||= this.clamps.length > 0
  }

  /** Return the settings of the controls. Throws an Error that says what is wrong. */
  settings() {
    const c = this.controls
    const read = (name, low, high, whole, empty) => {
      const text = c[name].value.trim()
      if (text === "" && empty !== undefined) return empty
      const value = Number(text)
      if (text === "" || !(value >= low && value <= high) || (whole && !Number.isInteger(value))) {
        throw new Error(`${name.replace("_", "-")} must be ${whole ? "a whole number" : "a number"} from ${low} to ${high}.`)
      }
      return value
    }
    const prompt = this.vocab.normalise(c.prompt.value)
    const missing = Array.from(prompt).find((char) => !this.vocab.idsOf(char).length)
    if (missing !== undefined)
      throw new Error(`The prompt has ${visible(missing)}, which is not one of the model's ${this.vocab.size} symbols.`)
    return {
      prompt,
      temperature: read("temperature", 1e-30, 1e9, false),
      topK: read("top_k", 1, 1e9, true, null),
      topP: read("top_p", 1e-9, 1, false, null),
      seed: read("seed", 0, 2 ** 32 - 1, true),
      length: read("length", 1, 1e6, true),
      stop: c.stop.value.replaceAll("\\n", "\n") || null,
      greedy: c.greedy.checked,
    }
  }

  another() {
    this.controls.seed.value = (Number(this.controls.seed.value) + 1) % 2 ** 32
    this.start()
  }

  toggle() {
    if (this.running) this.stopAll()
    else this.start()
  }

  stopAll() {
    this.stopped = true
    this.running?.cancel()
  }

  async start() {
    this.stopAll()
    const turn = (this.turn = (this.turn ?? 0) + 1)
    const status = byId("write-status"),
      output = byId("write-output")
    let settings
    try {
      settings = this.settings()
    } catch (error) {
      status.textContent = error.message
      return
    }
    status.textContent = "writing …"
    this.button.textContent = "Stop"
    this.stopped = false
    const runs = this.clamps.length
      ? [
          ["as it is", []],
          ["with the held units", this.clamps],
        ]
      : [["", []]]
    const areas = (this.areas = runs.map(([title]) => {
      const text = make("div", { className: "text written", tabIndex: 0 })
      text.append(make("span", { className: "prompt" }, ...shown(settings.prompt)))
      return { title, text, body: text.appendChild(document.createElement("span")), drawn: "" }
    }))
    output.replaceChildren(...areas.map(({ title, text }) => make("section", {}, title ? make("h3", {}, title) : null, text)))
    output.classList.toggle("pair", runs.length > 1)
    const began = performance.now()
    let symbols = 0
    try {
      for (const [k, [, clamps]] of runs.entries()) {
        if (this.stopped) break
        this.running = this.engine.ask("write", { ...settings, clamps }, (piece) => {
          if (turn !== this.turn) return
          areas[k].drawn += piece
          areas[k].body.append(...shown(piece))
          symbols += Array.from(piece).length
        })
        await this.running
        if (turn !== this.turn) return
      }
      if (runs.length > 1) markDifference(areas[0].drawn, areas[1].drawn, areas[1].body)
      const rate = symbols / ((performance.now() - began) / 1000)
      status.textContent = `${symbols.toLocaleString("en")} characters, ${Math.round(rate).toLocaleString("en")} per second`
    } catch (error) {
      if (turn === this.turn) status.textContent = error.message
    }
    if (turn !== this.turn) return
    this.running = null
    this.button.textContent = "Write"
  }
}

/** Show the second text in its element, and mark it from where it differs from the first. */
function markDifference(first, second, element) {
  const [a, b] = [Array.from(first), Array.from(second)]
  let same = 0
  while (same < a.length && same < b.length && a[same] === b[same]) same++
  element.replaceChildren(...shown(b.slice(0, same)), make("span", { className: "differs" }, ...shown(b.slice(same))))
}
