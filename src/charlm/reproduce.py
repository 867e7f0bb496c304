"""Train a recorded run again and compare the results.

    python -m charlm.reproduce --workdir DIR [--into DIR] [--json]
    python -m charlm.reproduce --result FILE --run ID [--into DIR] [--json]

A run that is not finished is reproduced up to its last checkpoint. Exit codes: 0: the results are equal to the bit; 1: they
are not.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from charlm.config import cli
from charlm.system.errors import ConfigError, RunFailed
from charlm.system.modules import import_module
from charlm.system.streams import write_output

if TYPE_CHECKING:
    from charlm.runs.reproduce import Record


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "the folder of the run", flag_values=values)
    flags.DEFINE_string("result", None, "the results.jsonl of an experiment", flag_values=values)
    flags.DEFINE_string("run", None, "the name of one of its runs", flag_values=values)
    flags.DEFINE_string("into", None, "the folder to train in; default: a temporary folder", flag_values=values)
    cli.define_cell_module(values)
    cli.define_corpus_module(values)
    flags.DEFINE_bool("json", False, "print one JSON object", flag_values=values)
    cli.parse(values, argv, __doc__)
    from charlm.runs.reproduce import record_from_results, record_from_workdir, reproduce

    import_module(values.cell_module, "cell")
    import_module(values.corpus_module, "corpus")
    if (values.workdir is None) == (values.result is None):
        raise ConfigError("give either --workdir DIR, or --result FILE and --run ID")
    if values.result is not None:
        record = record_from_results(Path(values.result), cli.required(values, "run"))
    else:
        record = record_from_workdir(Path(values.workdir))
    found = reproduce(record, Path(values.into) if values.into else None)
    write_output((json.dumps(found) if values.json else _as_lines(record, found)) + "\n")
    if not found["same"]:
        raise RunFailed(f"{record.name} was not reproduced to the bit")


def _as_lines(record: "Record", found: Mapping[str, Any]) -> str:
    """Return the comparison as lines for people."""
    lines = [f"{record.name}: {record.steps} steps, trained again"]
    lines.append(f"  corpus      the same, sha256 {str(record.manifest.get('corpus_sha256'))[:16]}...")
    lines.append(f"  machine     {'; '.join(found['machine']) or 'the same versions, device and cores'}")
    if found["same_params"]:
        lines.append(f"  parameters  the same to the bit, sha256 {found['params_sha256'][0]}")
    elif found["same_params"] is None:
        lines.append("  parameters  not on record")
    else:
        by = ""
        if "params_differ_by" in found:
            by = f"; by at most {found['params_differ_by']:.1e} of {found['params_differ_at']}"
        old, new = found["params_sha256"]
        lines.append(f"  parameters  differ: sha256 {old[:16]}... then, {new[:16]}... now{by}")
    if found["metrics_differ_by"]:
        lines.append(f"  metrics     differ by at most {found['metrics_differ_by']:.1e} ({found['metrics_differ_at']})")
    elif found["lines"]:
        lines.append(f"  metrics     the same to the bit, {found['lines']} lines")
    for name, (old, new) in found["result"].items():
        lines.append(f"  {name:18}  {old} then, {new} now")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(cli.run(main))
