"""Measure how far the logits of the page are from JAX's, and how far JAX's float32 is from its float64, for every cell.

    python experiments/explore/rounding.py --workdir runs/quickstart [--trained DIR ...]

The script opens the page of --workdir in headless Chromium (extra `browser`) and computes all models with it: the untrained
models of every cell, and the runs of --trained. All read the first 2,000 characters of the validation text of --workdir. The
script prints the record that it appends to results.jsonl.
"""

import argparse
import itertools
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # So that the script finds the other experiments.

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

import charlm  # noqa: E402
from charlm.config import default_config  # noqa: E402
from charlm.data.vocab import Vocab  # noqa: E402
from charlm.nn.model import CharLM  # noqa: E402
from charlm.serving import page  # noqa: E402
from charlm.serving.packing import pack  # noqa: E402
from charlm.serving.weights import CELLS, describe_model, describe_vocab, page_weights  # noqa: E402
from experiments import records  # noqa: E402
from experiments.explore.measure import call, open_page  # noqa: E402
from experiments.page import measure  # noqa: E402

_LOGITS = """
    const [payload, text] = args
    const engine = new charlm.Engine()
    await engine.ask("load", payload)
    const { logits } = await engine.ask("logits", { text })
    engine.worker.terminate()
    return Array.from(logits)
"""


def untrained_models(cell: str, vocab: Vocab) -> Iterator[charlm.LanguageModel]:
    """Yield untrained models of a cell over characters and over bytes, with 1 to 3 layers of 64 units."""
    for layers, (kind, symbols) in itertools.product((1, 2, 3), {"chars": vocab, "bytes": Vocab.all_bytes()}.items()):
        config = default_config()
        config.data.vocab = kind
        config.model.update(cell=cell, num_layers=layers, hidden_size=64, residual=layers == 3)
        config.model.encoding = "one_hot" if layers == 2 else "embedding"
        module = CharLM.from_config(config.model, symbols.size)
        yield charlm.LanguageModel(config.lock(), symbols, module.initial_params(jax.random.key(0)))


def page_logits(model: charlm.LanguageModel, text: str, driver: Any) -> np.ndarray:
    """Return the logits after each symbol of a text, shape (T, V), as the page computes them."""
    payload = {"model": describe_model(model), "vocab": describe_vocab(model), "weights": pack(page_weights(model))}
    return np.reshape(call(driver, _LOGITS, payload, text), (-1, model.vocab.size))


def float64_logits(model: charlm.LanguageModel, text: str) -> np.ndarray:
    """Return the logits after each symbol of a text, shape (T, V), as JAX computes them from the same weights in float64."""
    with jax.enable_x64(True):
        module = model.module.clone(dtype="float64")
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), model.params)
        ids_TB = jnp.asarray(model.vocab.encode(text)[:, None])
        logits_TBV, _ = jax.jit(module.apply)({"params": params}, ids_TB, module.initial_carry(params, 1))
        return np.asarray(logits_TBV[:, 0])


def differences(model: charlm.LanguageModel, text: str, driver: Any) -> np.ndarray:
    """Return the largest differences of a logit from JAX's in float32, shape (2, 2).

    The rows are the page and JAX in float64. The columns are the first 100 symbols and all symbols.
    """
    logits = np.asarray(model.step(text)[0])
    found = (np.abs(other - logits) for other in (page_logits(model, text, driver), float64_logits(model, text)))
    return np.array([(each[:100].max(), each.max()) for each in found])


def rounded(values: np.ndarray) -> dict[str, list[float]]:
    """Return the values of `differences` with two digits."""
    return {name: [float(f"{each:.1e}") for each in row] for name, row in zip(("page", "float64"), values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, help="the folder of the run whose page is opened")
    parser.add_argument("--trained", nargs="*", default=[], help="the folders of trained runs to measure too")
    parser.add_argument("--cells", nargs="*", default=list(CELLS), help="the cells of the untrained models")
    args = parser.parse_args()
    model = charlm.load(args.workdir)
    text, _ = page.page_text(model, 2000)
    found: dict[str, Any] = {"untrained": {}, "trained": {}}
    with tempfile.TemporaryDirectory() as folder, measure.browser() as driver:
        driver.set_script_timeout(300)
        path = Path(folder) / "page.html"
        page.write_page(model, path, None, 100)
        open_page(driver, path)
        for cell in args.cells:
            values = [differences(each, text, driver) for each in untrained_models(cell, model.vocab)]
            found["untrained"][cell] = rounded(np.max(values, axis=0))
        for workdir in args.trained:
            trained = charlm.load(workdir)
            config = trained.config.model
            name = f"{config.cell}, {config.num_layers} x {config.hidden_size} units, {trained.num_steps} steps"
            found["trained"][name] = rounded(differences(trained, text, driver))
    print(json.dumps(records.append(Path(__file__).parent, {"rounding": found}), indent=1))


if __name__ == "__main__":
    main()
