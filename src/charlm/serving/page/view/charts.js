// Small charts. Their colours come from the style sheet, except those of values.

/** Return a histogram of a unit while the detector is on and off, from `histogram` in statistics.js. */
function histogramChart({ on, off }, low, high) {
  const width = 320,
    height = 120,
    base = height - 18
  const most = Math.max(...on, ...off) || 1
  const step = width / on.length
  const svg = makeSvg("svg", {
    viewBox: `0 0 ${width} ${height}`,
    class: "chart histogram",
    role: "img",
    "aria-label": "histogram",
  })
  for (const [side, counts] of [
    ["off", off],
    ["on", on],
  ]) {
    counts.forEach((count, k) => {
      const tall = (count / most) * (base - 4)
      const bar = makeSvg("rect", { x: k * step + 0.5, y: base - tall, width: step - 1, height: tall, class: side })
      bar.append(makeSvg("title", {}, `${side}: ${(100 * count).toFixed(1)} %`))
      svg.append(bar)
    })
  }
  svg.append(makeSvg("line", { x1: 0, x2: width, y1: base, y2: base, class: "axis" }))
  for (const [x, value, anchor] of [
    [0, low, "start"],
    [width / 2, (low + high) / 2, "middle"],
    [width, high, "end"],
  ]) {
    svg.append(makeSvg("text", { x, y: height - 4, "text-anchor": anchor }, Number(value.toFixed(2)).toString()))
  }
  return svg
}

/** Return the plot of the saturation of one gate: each unit at (how often below 0.1, how often above 0.9). */
function saturationChart(title, points, selected, onPick) {
  const size = 150,
    left = 26,
    bottom = 24
  const svg = makeSvg("svg", {
    viewBox: `0 0 ${size + left + 8} ${size + bottom + 20}`,
    class: "chart saturation",
    role: "img",
    "aria-label": title,
  })
  const x = (value) => left + value * size,
    y = (value) => 16 + (1 - value) * size
  svg.append(makeSvg("text", { x: left, y: 10, class: "title" }, title))
  svg.append(makeSvg("rect", { x: left, y: 16, width: size, height: size, class: "frame" }))
  svg.append(makeSvg("line", { x1: x(0), y1: y(1), x2: x(1), y2: y(0), class: "axis" }))
  for (const { unit, left: low, right: high } of points) {
    const dot = makeSvg("circle", {
      cx: x(low),
      cy: y(high),
      r: 2.4,
      class: unit === selected ? "dot selected" : "dot",
      onclick: () => onPick(unit),
    })
    dot.unit = unit
    dot.append(
      makeSvg(
        "title",
        {},
        `unit ${unit}: below 0.1 ${(100 * low).toFixed(0)} % of the time, above 0.9 ${(100 * high).toFixed(0)} %`,
      ),
    )
    svg.append(dot)
  }
  svg.append(makeSvg("text", { x: left + size / 2, y: size + 32, "text-anchor": "middle" }, "below 0.1"))
  svg.append(
    makeSvg(
      "text",
      { x: 0, y: 0, "text-anchor": "middle", transform: `translate(${left - 14} ${16 + size / 2}) rotate(-90)` },
      "above 0.9",
    ),
  )
  for (const value of [0, 1]) {
    svg.append(makeSvg("text", { x: x(value), y: size + 28, "text-anchor": "middle" }, String(value)))
    svg.append(makeSvg("text", { x: left - 4, y: y(value) + 4, "text-anchor": "end" }, String(value)))
  }
  return svg
}

/** A heat map of units over time. It draws a window of the text, whose characters stand below the columns. */
class HeatMap {
  /** onPick(unit, place) is called when a cell is chosen. */
  constructor(canvas, onPick) {
    Object.assign(this, { canvas, onPick, rows: [], chars: [], first: 0, width: 0, place: 0 })
    new ResizeObserver(([entry]) => {
      this.width = entry.contentRect.width
      if (this.rows.length && this.width) this.centre(this.place)
    }).observe(canvas.parentElement)
    canvas.addEventListener("click", (event) => {
      const row = Math.floor((event.offsetY - 2) / HeatMap.ROW),
        column = Math.floor((event.offsetX - HeatMap.LEFT) / HeatMap.COLUMN)
      if (this.rows[row] && column >= 0 && column < this.columns) this.onPick(this.rows[row].unit, this.first + column)
    })
  }

  static ROW = 11
  static COLUMN = 9
  static LEFT = 40

  get columns() {
    return Math.max(1, Math.min(this.chars.length, Math.floor((this.width - HeatMap.LEFT - 4) / HeatMap.COLUMN)))
  }

  /** Show rows {unit, color: place -> CSS colour} around a place. The span `brush` is marked, if there is one. */
  show(rows, chars, place, selected, brush) {
    Object.assign(this, { rows, chars, selected, brush })
    this.centre(place)
  }

  /** Draw the window around a place, with the place marked. */
  centre(place) {
    this.place = place
    if (!this.width) return // It is hidden.
    const columns = this.columns
    if (place < this.first || place >= this.first + columns) this.first = place - Math.floor(columns / 2)
    this.first = Math.max(0, Math.min(this.chars.length - columns, this.first))
    this.draw(place, columns)
  }

  draw(place, columns) {
    const { canvas, rows, chars, first } = this
    const { ROW, COLUMN, LEFT } = HeatMap
    const width = LEFT + columns * COLUMN + 2,
      height = rows.length * ROW + 22
    const ratio = window.devicePixelRatio || 1
    canvas.width = width * ratio
    canvas.height = height * ratio
    canvas.style.width = `${width}px`
    canvas.style.height = `${height}px`
    const context = canvas.getContext("2d")
    context.scale(ratio, ratio)
    const style = getComputedStyle(canvas)
    context.font = `9px ${style.fontFamily}`
    context.textAlign = "right"
    rows.forEach(({ unit, color }, row) => {
      context.fillStyle = style.color
      context.globalAlpha = unit === this.selected ? 1 : 0.6
      context.fillText(unit === this.selected ? `▸${unit}` : String(unit), LEFT - 5, row * ROW + 11)
      context.globalAlpha = 1
      for (let k = 0; k < columns; k++) {
        context.fillStyle = color(first + k)
        context.fillRect(LEFT + k * COLUMN, row * ROW + 2, COLUMN - 1, ROW - 1)
      }
    })
    context.textAlign = "center"
    context.fillStyle = style.color
    context.font = `10px ${style.getPropertyValue("--mono")}`
    for (let k = 0; k < columns; k++) {
      const char = chars[first + k]
      context.fillText(isControl(char) ? "·" : visible(char), LEFT + (k + 0.5) * COLUMN, rows.length * ROW + 15)
    }
    const mark = (from, to, color) => {
      context.strokeStyle = color
      context.strokeRect(LEFT + (from - first) * COLUMN - 0.5, 1.5, (to - from) * COLUMN, rows.length * ROW + 18)
    }
    mark(place, place + 1, style.color)
    const [from, to] = this.brush ?? [0, 0]
    if (to > first && from < first + columns && to > from)
      mark(Math.max(from, first), Math.min(to, first + columns), style.getPropertyValue("--accent"))
  }
}
