// What matters: the symbols before a character, lit by how much they influence its prediction. `serving/influence.py` computes
// the gradients.

const INFLUENCE_STEPS = 31

class MattersPanel {
  /** `influence` is an array (N, K) in steps of the largest value of each row; values are square roots. */
  constructor(influence, { chars, ends }) {
    Object.assign(this, { data: influence.data, reach: influence.shape[1], chars, ends, lit: [] })
    this.view = new TextView(byId("matters-text"), { onPoint: (place) => place !== null && this.point(place) })
    this.view.setChars(chars)
    this.point(Math.min(chars.length - 1, 120))
  }

  /** Return the influence of each character before one, [{place, value}], from near to far. The largest value is 1. */
  influences(place) {
    const { ends } = this
    const target = place ? ends[place - 1] : 0 // The first symbol of the character.
    const found = []
    let k = 0
    for (let at = place - 1; at >= 0 && k < this.reach; at--) {
      let value = 0
      for (const first = at ? ends[at - 1] : 0; k < this.reach && target - 1 - k >= first; k++) {
        value = Math.max(value, this.data[target * this.reach + k] / INFLUENCE_STEPS)
      }
      found.push({ place: at, value })
    }
    return found
  }

  point(place) {
    for (const each of this.lit) this.view.spans[each].style.backgroundColor = ""
    this.view.spans[this.target]?.classList.remove("target")
    this.target = place
    this.view.spans[place].classList.add("target")
    const found = this.influences(place)
    this.lit = found.map((each) => each.place)
    for (const { place: at, value } of found) this.view.spans[at].style.backgroundColor = influenceColor(value)
    byId("matters-title").textContent = place ? `For ${visible(this.chars[place])}` : "Nothing predicts the first character"
    const strongest = [...found]
      .sort((a, b) => b.value - a.value)
      .slice(0, 8)
      .filter(({ value }) => value > 0)
    const items = strongest.map(({ place: at, value }) =>
      make("li", {}, ...barParts(visible(this.chars[at]), value * value, `${place - at} back`, "amber")),
    )
    byId("matters-list").replaceChildren(...items)
  }
}
