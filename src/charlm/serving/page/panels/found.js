// Found: which units are on in a brushed span and off around it, and where else they are on.

// How much of the text around a place is shown.
const CONTEXT = 18
const MOST_SHOWN = 40

/** Show what `findAlike` has found. `brush` is null if there is no brush. */
function showFound(brush, { units, places }, chars, { onUnit, onPlace }) {
  byId("found").hidden = !brush
  if (!brush) return
  const text = (start, end) =>
    chars
      .slice(Math.max(0, start), end)
      .map((char) => (char === " " ? " " : visible(char)))
      .join("")
  byId("found-span").textContent = `“${text(...brush)}”`
  byId("found-none").hidden = units.length > 0
  byId("found-places-title").hidden = !places.length
  const chips = units.map(({ unit, sign, within, around }) => {
    const title = `mean ${signed(sign * within)} of its largest magnitude within, ${signed(sign * around)} around`
    const side = make("small", {}, sign < 0 ? " low" : " high")
    return make("li", {}, make("button", { className: "chip", title, onclick: () => onUnit(unit) }, String(unit), side))
  })
  byId("found-units").replaceChildren(...chips)
  const items = places.map(({ start, end }) => {
    const parts = [
      text(start - CONTEXT, start),
      make("b", {}, text(start, Math.min(end, start + MOST_SHOWN))),
      text(end, end + CONTEXT),
    ]
    return make("li", {}, make("button", { className: "place", onclick: () => onPlace([start, end]) }, ...parts))
  })
  byId("found-places").replaceChildren(...items)
}
