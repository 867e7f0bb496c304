// Make elements. Strings become text nodes, never markup.

/** Return an element. Properties are set as such, `on...` are listeners, and `data-`, `aria-` and `role` are attributes. */
function make(tag, properties = {}, ...children) {
  return fill(document.createElement(tag), properties, children)
}

function makeSvg(tag, properties = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag)
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value)
    else element.setAttribute(name, value)
  }
  element.append(...children)
  return element
}

function fill(element, properties, children) {
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value)
    else if (name.includes("-") || name === "role") element.setAttribute(name, value)
    else element[name] = value
  }
  element.append(...children.flat().filter((child) => child !== null))
  return element
}

/** Return a labelled control. */
function field(label, control, hint = null) {
  return make(
    "label",
    { className: "field" },
    make("span", { className: "label" }, label),
    control,
    hint && make("span", { className: "hint" }, hint),
  )
}

function select(options, onchange) {
  const items = options.map(([value, text]) => make("option", { value }, text))
  return make("select", { onchange }, items)
}

function byId(id) {
  return document.getElementById(id)
}

/** Return the parts of a row of bars: a name, a bar of a length from 0 to 1, and a text. `kind` is a class of the bar. */
function barParts(name, length, text, kind = "") {
  const bar = make("span", { className: `bar ${kind}` })
  bar.style.width = `${(100 * length).toFixed(1)}%`
  return [
    make("span", { className: "symbol" }, name),
    make("span", { className: "track" }, bar),
    make("span", { className: "percent" }, text),
  ]
}

/** Return a function that calls another one at most once per frame, with the last arguments. */
function oncePerFrame(call) {
  let waiting = null
  return (...args) => {
    if (!waiting) {
      requestAnimationFrame(() => {
        const last = waiting
        waiting = null
        call(...last)
      })
    }
    waiting = args
  }
}

/** Return a number with a sign, or as it is. */
function signed(number, digits = 2) {
  return `${number < 0 ? "−" : "+"}${Math.abs(number).toFixed(digits)}`
}
