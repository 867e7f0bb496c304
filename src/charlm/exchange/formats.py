"""The formats of an export. A format is one function and one entry of `FORMATS`.

The help of the command names the formats, so this module imports what they need when they are used.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from charlm.system.errors import ConfigError

if TYPE_CHECKING:
    from charlm.runs.language_model import LanguageModel


class Options(NamedTuple):
    """The shapes of a StableHLO program: the number of texts at a time, and of symbols in a call of the scorer."""

    batch: int
    window: int


def write_hub_folder(model: "LanguageModel", path: Path, options: Options) -> None:
    """Write the folder of `folder.write_folder`."""
    del options
    from charlm.exchange.folder import write_folder

    write_folder(model, path)


def write_torch(model: "LanguageModel", path: Path, options: Options) -> None:
    """Write the state dict of `torch_names.to_torch`: as safetensors if the suffix is .safetensors, else by torch.save."""
    del options
    from charlm.exchange.files import new_path, require, write_safetensors
    from charlm.exchange.torch_names import to_torch

    arrays = to_torch(model.config.model, model.params)
    if path.suffix not in (".pt", ".pth", ".safetensors"):
        raise ConfigError(f"--output {path} must end in .pt, .pth or .safetensors")
    torch = None if path.suffix == ".safetensors" else require("torch", "parity")
    with new_path(path) as partial:
        if torch is None:
            write_safetensors(partial, arrays, model.vocab, model.num_steps)
        else:
            torch.save({name: torch.tensor(array) for name, array in arrays.items()}, partial)


def write_onnx(model: "LanguageModel", path: Path, options: Options) -> None:
    """Write the graph of `onnx_model.write_onnx`."""
    del options
    from charlm.exchange import onnx_model

    onnx_model.write_onnx(model, path)


def write_stablehlo(model: "LanguageModel", path: Path, options: Options) -> None:
    """Write the programs of `stablehlo.write_stablehlo`."""
    from charlm.exchange import stablehlo

    stablehlo.write_stablehlo(model, path, *options)


FORMATS: Mapping[str, Callable[["LanguageModel", Path, Options], None]] = {
    "safetensors": write_hub_folder,
    "torch": write_torch,
    "onnx": write_onnx,
    "stablehlo": write_stablehlo,
}


def export_model(model: "LanguageModel", format: str, path: str | Path, batch: int = 1, window: int = 64) -> None:
    """Export a model.

    Args:
        model: the model.
        format: a key of `FORMATS`.
        path: the new folder or file.
        batch: for stablehlo: the number of texts at a time.
        window: for stablehlo: the number of symbols that one call of the scorer scores.

    Raises:
        ConfigError: the model has a part that the format cannot hold, or a package is not installed.
        WorkdirError: the path exists, or its folder does not.
        RunFailed: something cannot be written.
    """
    FORMATS[format](model, Path(path), Options(batch, window))
