// The page's side of the worker.

/** A worker that holds one model. A test opens more of them. */
class Engine {
  constructor() {
    const source = new Blob([byId("engine").textContent], { type: "text/javascript" })
    this.worker = new Worker(URL.createObjectURL(source))
    this.worker.onmessage = ({ data }) => this.receive(data)
    this.requests = new Map()
    this.last = 0
  }

  /** Ask for something; return a promise of the result, with a function `cancel`. `onPiece` gets what arrives before. */
  ask(method, args, onPiece = () => {}) {
    const id = ++this.last
    const promise = new Promise((resolve, reject) => this.requests.set(id, { resolve, reject, onPiece }))
    promise.cancel = () => {
      if (!this.requests.has(id)) return
      this.requests.get(id).onPiece = () => {}
      this.worker.postMessage({ cancel: id })
    }
    this.worker.postMessage({ id, method, args })
    return promise
  }

  receive({ id, piece, result, error }) {
    const request = this.requests.get(id)
    if (piece !== undefined) return request.onPiece(piece)
    this.requests.delete(id)
    if (error !== undefined) request.reject(new Error(error))
    else request.resolve(result)
  }
}
