"""Serve a model over HTTP, as OpenAI's clients speak it: completions, and the page that holds the model.

    python -m charlm.serve --workdir DIR [--host 127.0.0.1] [--port 8000] [--rows N] [--queue N] [--grace SECONDS]
        [--checkpoint best|latest|STEP]

The server answers /v1/completions and /v1/models, and shows the page of `charlm.explore` at /. It needs the extra `serve`. Only
programs of this machine reach it, unless --host names another address. It has no passwords and no encryption.
"""

import ipaddress
import sys
from collections.abc import Sequence

from absl import flags

from charlm.config import cli
from charlm.system.errors import Exit
from charlm.system.modules import import_module
from charlm.system.progress import say


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "the run's folder", flag_values=values)
    flags.DEFINE_string("host", "127.0.0.1", "the address to listen on; 0.0.0.0: all of this machine", flag_values=values)
    flags.DEFINE_integer("port", 8000, "the port; 0: any free one", 0, 65535, flag_values=values)
    flags.DEFINE_integer("rows", 32, "the most texts that are drawn at the same time", 1, 1024, flag_values=values)
    flags.DEFINE_integer("queue", 256, "the most requests at the same time; others get 429", 1, 65536, flag_values=values)
    flags.DEFINE_float("grace", 10.0, "seconds to finish texts after SIGTERM or SIGINT", 0.0, 3600.0, flag_values=values)
    flags.DEFINE_string("checkpoint", "best", "best, latest or a step", flag_values=values)
    cli.define_cell_module(values)
    cli.define_corpus_module(values)
    cli.parse(values, argv, __doc__)
    workdir = cli.required(values, "workdir")
    from charlm.exchange.files import require
    from charlm.exchange.folder import load
    from charlm.serving.requests import Limits

    for package in ("starlette", "uvicorn"):
        require(package, "serve")
    from charlm.serving import server  # It needs the extra.

    import_module(values.corpus_module, "corpus")
    listener = server.listen(values.host, values.port)
    model = load(workdir, values.checkpoint, values.cell_module)
    address, port = listener.getsockname()[:2]
    local = ipaddress.ip_address(address).is_loopback
    hosts = ["localhost", "127.0.0.1", "::1", "[::1]", values.host.lower()] if local else None
    app = server.Server(model, values.rows, Limits(requests=values.queue), hosts)
    shown = f"[{address}]" if ":" in address else address

    def announce() -> None:
        say(f"charlm: {model.path}, checkpoint of step {model.num_steps}, on http://{shown}:{port}")
        if not local:
            say("charlm: other machines can reach this server, and it has no passwords")

    raise Exit(128 + server.serve(app, listener, values.grace, announce))


if __name__ == "__main__":
    sys.exit(cli.run(main))
