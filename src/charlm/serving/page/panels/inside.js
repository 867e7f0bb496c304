// Look inside: the text coloured by one unit, the units that follow a detector, a histogram, saturation, and a heat map. A
// brushed span is looked up in view/find.js.

const NUM_RANKED = 40,
  NUM_ROWS = 28

class InsidePanel {
  constructor(activations, onHold) {
    Object.assign(this, { onHold, unit: 0, layer: 0, detector: "line", alike: [], dots: {} })
    this.view = new TextView(byId("inside-text"), {
      onPoint: (place) => this.point(place),
      onBrush: (brush) => this.find(brush),
    })
    this.heat = new HeatMap(byId("heat"), (unit, place) => {
      this.choose(unit)
      this.view.setCursor(place, true)
    })
    this.makeControls()
    this.setActivations(activations)
  }

  makeControls() {
    this.layerSelect = select([], () => this.setArray(Number(this.layerSelect.value), this.kindSelect.value))
    this.kindSelect = select([], () => this.setArray(this.layer, this.kindSelect.value))
    this.unitInput = make("input", {
      id: "inside-unit",
      type: "number",
      min: 0,
      step: 1,
      value: 0,
      oninput: () => this.choose(Number(this.unitInput.value)),
    })
    this.detectorSelect = select([...DETECTORS.map(([key, label]) => [key, label]), ["own", "a regular expression …"]], () =>
      this.setDetector(this.detectorSelect.value),
    )
    this.expression = make("input", {
      id: "inside-expression",
      placeholder: "for example \\bthe\\b",
      spellcheck: false,
      oninput: oncePerFrame(() => this.setDetector("own")),
    })
    this.layerSelect.id = "inside-layer"
    this.kindSelect.id = "inside-kind"
    this.detectorSelect.id = "inside-detector"
    this.layerField = field("Layer", this.layerSelect)
    this.expressionField = field("Expression", this.expression)
    this.expressionField.hidden = true
    byId("inside-controls").append(
      this.layerField,
      field("Values", this.kindSelect),
      field("Unit", this.unitInput),
      field("What a unit may follow", this.detectorSelect),
      this.expressionField,
    )
    const hold = make("button", { id: "inside-hold", className: "small", onclick: () => this.hold() }, "Hold it while writing")
    byId("inside-hold-place").append(hold)
    this.holdButton = hold
    byId("ranked").addEventListener("keydown", (event) => this.onListKey(event))
  }

  /** Show other activations: those of another text. */
  setActivations(activations) {
    this.activations = activations
    this.saturatedLayer = null
    this.alike = []
    this.view.setBrush(null)
    this.view.setCursor(null)
    this.place = null
    this.view.setChars(activations.chars)
    const layers = activations.layers
    this.layerSelect.replaceChildren(...layers.map((k) => make("option", { value: k }, `layer ${k}`)))
    this.layerField.hidden = layers.length < 2
    this.detect()
    this.setArray(Math.min(this.layer, layers.length - 1), this.kind ?? (activations.kinds(0).includes("c") ? "c" : "h"))
    byId("found").hidden = true
  }

  get name() {
    return `layer_${this.layer}.${this.kind}`
  }

  setArray(layer, kind) {
    Object.assign(this, { layer, kind })
    this.kindSelect.replaceChildren(
      ...this.activations.kinds(layer).map((each) => make("option", { value: each }, this.activations.label(each))),
    )
    this.kindSelect.value = kind
    this.layerSelect.value = layer
    this.unitInput.max = this.activations.units(this.name) - 1
    this.holdButton.hidden = kind.startsWith("gate_")
    this.rank(true)
    if (this.saturatedLayer !== layer) this.drawSaturation()
    if (this.view.brush) this.find(this.view.brush)
  }

  setDetector(key) {
    this.detector = this.detectorSelect.value = key
    this.expressionField.hidden = key !== "own"
    this.detect()
    this.rank(true)
  }

  /** Compute the detector on the text. */
  detect() {
    const { chars } = this.activations
    const note = byId("inside-note")
    note.textContent = ""
    let detector = DETECTORS.find(([key]) => key === this.detector)?.[2]
    try {
      detector ??= detectorOf(this.expression.value || "(?!)")
    } catch (error) {
      note.textContent = error.message
      detector = detectorOf("(?!)")
    }
    this.detected = detector(chars)
    this.split = isOn(this.detected)
    const count = this.split.on.filter(Boolean).length
    this.split.count = count
    if (!note.textContent && (count === 0 || count === chars.length))
      note.textContent = "It is the same at every character of this text, so no unit can follow it."
  }

  /** Rank the units, and choose the first one if asked to. */
  rank(chooseFirst) {
    this.ranked = rankUnits(this.activations, this.name, this.detected)
    this.rankOf = Object.fromEntries(this.ranked.map(({ unit }, rank) => [unit, rank]))
    const list = byId("ranked")
    list.replaceChildren(
      ...this.ranked.slice(0, NUM_RANKED).map(({ unit, r }) => {
        const properties = { className: "unit", role: "option", tabIndex: -1, onclick: () => this.choose(unit) }
        const item = make("button", properties, ...barParts(String(unit), Math.abs(r), signed(r), r < 0 ? "negative" : ""))
        item.unit = unit
        return item
      }),
    )
    this.choose(chooseFirst ? this.ranked[0].unit : this.unit)
  }

  /** Move through the list of units with the arrow keys. */
  onListKey(event) {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key]
    if (!step) return
    event.preventDefault()
    const items = [...byId("ranked").children]
    const at = items.findIndex((item) => item.unit === this.unit)
    const next = items[Math.max(0, Math.min(items.length - 1, at + step))]
    next.scrollIntoView({ block: "nearest" })
    this.choose(next.unit)
  }

  choose(unit) {
    const count = this.activations.units(this.name)
    if (!(Number.isInteger(unit) && unit >= 0 && unit < count)) return
    this.unit = unit
    if (Number(this.unitInput.value) !== unit || this.unitInput.value === "") this.unitInput.value = unit
    this.values = this.activations.unit(this.name, unit)
    this.largest = this.activations.largest(this.name, this.values)
    this.view.paint((i) => divergingColor(this.values[i] / this.largest))
    for (const item of byId("ranked").children) item.setAttribute("aria-selected", item.unit === unit)
    this.drawHistogram()
    this.drawHeat()
    for (const dot of document.querySelectorAll("#saturation .selected")) dot.classList.remove("selected")
    for (const dot of this.dots[unit] ?? []) dot.classList.add("selected")
    this.point(this.place ?? null)
  }

  point(place) {
    this.place = place
    const r = this.ranked[this.rankOf[this.unit]].r
    byId("inside-title").textContent =
      `${this.activations.layers.length > 1 ? `Layer ${this.layer}, ` : ""}${this.activations.label(this.kind)}, unit ${this.unit}`
    byId("inside-correlation").textContent = `correlation ${signed(r)}`
    byId("inside-value").textContent =
      place === null
        ? `largest magnitude ${this.largest.toFixed(2)}`
        : `${visible(this.activations.chars[place])} ${signed(this.values[place])}`
    if (place !== null) this.heat.centre(place)
  }

  drawHistogram() {
    const low = this.activations.isLogistic(this.name) ? 0 : -this.largest
    const counts = histogram(this.values, this.split.on, low, this.largest, 31)
    byId("histogram").replaceChildren(histogramChart(counts, low, this.largest))
    const label = this.detector === "own" ? "the expression" : DETECTORS.find(([key]) => key === this.detector)[1]
    const limit = this.split.twoValued ? "" : ` above ${this.split.threshold}`
    byId("legend-on").textContent = `${label}${limit} (${this.split.count.toLocaleString("en")})`
    byId("legend-off").textContent = `elsewhere (${(this.detected.length - this.split.count).toLocaleString("en")})`
  }

  drawHeat() {
    const row = (unit) => {
      const values = this.activations.unit(this.name, unit)
      const largest = this.activations.largest(this.name, values)
      return { unit, color: (i) => divergingColor(values[i] / largest) }
    }
    // The units of a brushed span come first, then those that follow the detector.
    const units = [...new Set([...this.alike, ...this.ranked.map(({ unit }) => unit)])].slice(0, NUM_ROWS)
    if (!units.includes(this.unit)) units.splice(NUM_ROWS - 1, 1, this.unit)
    this.heat.show(units.map(row), this.activations.chars, this.place ?? 0, this.unit, this.view.brush)
  }

  drawSaturation() {
    this.saturatedLayer = this.layer
    const gates = this.activations.kinds(this.layer).filter((kind) => this.activations.isLogistic(kind))
    byId("saturation-section").hidden = !gates.length
    const charts = gates.map((kind) => {
      const points = saturation(this.activations, `layer_${this.layer}.${kind}`)
      return saturationChart(this.activations.label(kind), points, this.unit, (unit) => {
        if (this.kind !== kind) this.setArray(this.layer, kind)
        this.choose(unit)
      })
    })
    byId("saturation").replaceChildren(...charts)
    this.dots = {}
    for (const dot of document.querySelectorAll("#saturation .dot")) (this.dots[dot.unit] ??= []).push(dot)
  }

  hold() {
    const value =
      this.place === null ? this.largest * Math.sign(this.ranked[this.rankOf[this.unit]].r || 1) : this.values[this.place]
    this.onHold(this.layer, this.kind, this.unit, Number(value.toFixed(3)))
  }

  /** Look up a brushed span, and mark its units in the heat map. */
  find(brush) {
    const found = brush ? findAlike(this.activations, this.name, brush) : { units: [], places: [] }
    this.alike = found.units.map(({ unit }) => unit)
    this.drawHeat()
    showFound(brush, found, this.activations.chars, {
      onUnit: (unit) => this.choose(unit),
      onPlace: (span) => this.view.goTo(span),
    })
  }
}
