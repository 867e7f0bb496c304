"""Score a text: nats and bits per character, perplexity.

    python -m charlm.evaluate --workdir DIR [--split train|val|test | --text FILE] [--checkpoint best|latest|STEP]
        [--dynamic] [--per_document] [--json]

With `--dynamic` a second score is reported: the score of a model that learns from the text that it has scored. With
`--per_document` the score of each document is reported too.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from charlm.config import cli
from charlm.system.errors import ConfigError
from charlm.system.modules import import_module
from charlm.system.streams import write_output

_LABELS = {
    "count": "characters scored",
    "bytes": "bytes scored",
    "unknown": "unknown in the text",
    "nats_per_char": "nats per character",
    "bits_per_char": "bits per character",
    "perplexity": "perplexity",
    "nats_per_byte": "nats per byte",
    "bits_per_byte": "bits per byte",
    "dynamic_nats_per_char": "dynamic: nats per character",
    "dynamic_bits_per_char": "dynamic: bits per character",
    "dynamic_perplexity": "dynamic: perplexity",
    "dynamic_nats_per_byte": "dynamic: nats per byte",
    "dynamic_bits_per_byte": "dynamic: bits per byte",
}


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "the run's folder", flag_values=values)
    flags.DEFINE_enum("split", "val", ["train", "val", "test"], "the part of the run's corpus to score", flag_values=values)
    flags.DEFINE_string("text", None, "a UTF-8 text file to score instead", flag_values=values)
    flags.DEFINE_string("checkpoint", "best", "best, latest or a step", flag_values=values)
    cli.define_cell_module(values)
    cli.define_corpus_module(values)
    flags.DEFINE_bool(
        "dynamic", False, "report a second score, by a model that learns from the text that it has scored", flag_values=values
    )
    flags.DEFINE_bool("per_document", False, "for data.documents: report the score of each document too", flag_values=values)
    flags.DEFINE_bool("json", False, "print one JSON object", flag_values=values)
    cli.parse(values, argv, __doc__)
    from charlm.exchange.folder import load

    import_module(values.corpus_module, "corpus")
    model = load(cli.required(values, "workdir"), values.checkpoint, values.cell_module)
    if values.text is not None and values["split"].present:
        raise ConfigError("--split and --text exclude each other; give one of them")
    found = model.evaluate(values.split, values.text, values.dynamic, values.per_document)
    write_output((json.dumps(found) if values.json else _as_lines(found)) + "\n")


def _as_lines(found: Mapping[str, Any]) -> str:
    """Return a score as a table for people."""
    lines, documents = [f"{found['text']}, checkpoint of step {found['checkpoint']}"], found.get("documents", [])
    metrics = {key: key for key in found if key not in _LABELS and key not in ("text", "checkpoint", "documents")}
    for key, label in {**_LABELS, **metrics}.items():
        if key in found:
            value = found[key]
            lines.append(f"  {label:28}  {format(value, ',') if isinstance(value, int) else format(value, '.4f')}")
    lines += [f"  {each['nats']:9.4f} nats  {each['nats_per_char']:.4f} per character  {each['text']!r}" for each in documents]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(cli.run(main))
