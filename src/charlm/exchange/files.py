"""Read and write the files of a model: safetensors, PyTorch's state dicts and vocabularies. Nothing in a file is executed."""

import contextlib
import importlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from charlm.data.vocab import Vocab
from charlm.exchange.torch_names import ImportFailed, StateDict
from charlm.runs.flat_state import sha256
from charlm.system.errors import ConfigError, RunFailed, UserError, WorkdirError
from charlm.system.files import flush_folder_to_disk, read_json

# PyTorch's names of the dtypes that an import accepts, as safetensors writes them.
_DTYPES = {"F64", "F32", "F16", "BF16"}


def require(package: str, extra: str) -> ModuleType:
    """Return a module of an optional package. Raises ConfigError, which names the extra, if it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError:
        name = package.split(".")[0]
        raise ConfigError(f"{name} is not installed: pip install 'charlm[{extra}]'") from None


@contextlib.contextmanager
def new_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside a new file or folder, which gets its name at the end. On an error nothing is left.

    Raises:
        WorkdirError: the path exists, or its folder does not.
        RunFailed: something cannot be written.
    """
    path = Path(os.path.abspath(path))
    if os.path.lexists(path):
        raise WorkdirError(f"--output {path} exists already; name a new one")
    if not path.parent.is_dir():
        raise WorkdirError(f"--output {path}: the folder {path.parent} does not exist")
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name[:100]}.") as folder:
            partial = Path(folder) / path.name
            yield partial
            partial.rename(path)
        flush_folder_to_disk(path.parent)
    except UserError:
        raise
    except Exception as error:  # PyTorch and safetensors raise types of their own if a disk is full.
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise RunFailed(f"cannot write {path}: {reason}") from None


def write_safetensors(path: Path, arrays: StateDict, vocab: Vocab, step: int) -> None:
    """Write arrays into a safetensors file. Its metadata hold the number of steps, and hashes of arrays and vocabulary."""
    metadata = {"format": "pt", "step": str(step), "params_sha256": sha256(arrays), "vocab_sha256": vocab.sha256()}
    require("safetensors.numpy", "export").save_file(arrays, path, metadata=metadata)


def read_safetensors(path: Path, shapes: Mapping[str, tuple[int, ...]] | None = None) -> StateDict:
    """Return the arrays of a safetensors file.

    Args:
        path: the file.
        shapes: the names and shapes that the file must declare, checked before any array is read; None: any floating ones.

    Raises:
        ImportFailed: the file is missing or damaged, or declares other arrays.
    """
    safetensors = require("safetensors", "export")
    if not path.is_file():
        raise ImportFailed(f"{path} does not exist" if not path.exists() else f"{path} is not a file")
    try:
        with safetensors.safe_open(path, "np") as file:
            names = list(file.keys())
            declared = {name: (tuple(file.get_slice(name).get_shape()), file.get_slice(name).get_dtype()) for name in names}
            for name, (shape, dtype) in declared.items():
                if shapes is not None and (shape != shapes.get(name) or dtype != "F32"):
                    should = f"F32 {list(shapes[name])}" if name in shapes else "absent"
                    raise ImportFailed(f"{path}: {name} is {dtype} {list(shape)}, but config.json asks for {should}")
                if dtype not in _DTYPES:
                    raise ImportFailed(f"{path}: {name} has dtype {dtype}; parameters are floating-point numbers")
            if shapes is not None and (missing := sorted(shapes.keys() - declared.keys())):
                raise ImportFailed(f"{path} lacks {missing[0]}, which config.json asks for")
            return {name: _from_safetensors(file, name, declared[name][1]) for name in names}
    except OSError as error:
        raise ImportFailed(f"{path} cannot be read: {error.strerror or error}") from None
    except safetensors.SafetensorError as error:
        raise ImportFailed(f"{path} is no whole safetensors file: {' '.join(str(error).split())[:200]}") from None


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a whole safetensors file."""
    with require("safetensors", "export").safe_open(path, "np") as file:
        return file.metadata() or {}


def _from_safetensors(file: Any, name: str, dtype: str) -> np.ndarray:
    """Return one array. NumPy has no bfloat16, so it comes from the package ml_dtypes, which JAX installs."""
    if dtype == "BF16":
        import ml_dtypes  # noqa: F401  # Registers the dtype with NumPy.
    return np.asarray(file.get_tensor(name))


def read_state_dict(path: Path) -> StateDict:
    """Return the arrays of a state dict: a safetensors file, or a file of `torch.save` with suffix .pt, .pth or .bin.

    A file of `torch.save` is a pickle, which can hold code. It is read with `weights_only=True`, which refuses everything but
    tensors in plain containers, and executes nothing.

    Raises:
        ImportFailed: the file is missing or damaged, or holds something other than a state dict.
        ConfigError: the package that reads it is not installed.
    """
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    if path.suffix not in (".pt", ".pth", ".bin"):
        raise ImportFailed(f"{path} has suffix {path.suffix!r}; it must be .safetensors, .pt, .pth or .bin")
    torch = require("torch", "parity")
    if not path.is_file():
        raise ImportFailed(f"{path} does not exist" if not path.exists() else f"{path} is not a file")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # PyTorch raises many types for damaged files and for pickles with code.
        reason = " ".join(str(error).split())
        kind = "holds more than tensors and is refused" if "weights_only" in reason.lower() else "cannot be read"
        raise ImportFailed(f"{path} {kind} ({type(error).__name__}); save model.state_dict() again") from None
    if not isinstance(found, dict) or not all(isinstance(each, torch.Tensor) for each in found.values()):
        keys = ", ".join(map(str, list(found)[:5])) if isinstance(found, dict) else type(found).__name__
        raise ImportFailed(f"{path} is no state dict: it holds {keys}; save model.state_dict()")
    for name, each in found.items():
        if not each.dtype.is_floating_point:
            raise ImportFailed(f"{path}: {name} has dtype {each.dtype}; parameters are floating-point numbers")
        if each.layout != torch.strided or each.is_meta:
            raise ImportFailed(f"{path}: {name} is a sparse tensor, or one without values; save dense tensors")
    return {str(name): _from_tensor(torch, each) for name, each in found.items()}


def _from_tensor(torch: ModuleType, tensor: Any) -> np.ndarray:
    return tensor.detach().to(torch.float64 if tensor.dtype == torch.float64 else torch.float32).contiguous().numpy()


def read_symbols(path: Path) -> tuple[Vocab, str]:
    """Return the vocabulary in a file, and its symbols in the order of the ids that the file gives them.

    The file is JSON: a charlm vocab.json, a list of characters in the order of their ids, or an object that maps characters to
    ids, or ids to characters.

    Raises:
        ImportFailed: the file is none of these.
        WorkdirError: the file cannot be read.
    """
    value = read_json(path)
    if isinstance(value, dict) and "kind" in value:
        try:
            vocab = Vocab.from_json(value)
        except ValueError as error:
            raise ImportFailed(f"{path} is not a vocabulary: {error}") from None
        return vocab, vocab.symbols
    if isinstance(value, dict):
        pairs = list(value.items())
        if all(isinstance(char, str) for _, char in pairs):  # JSON turns the ids, which are keys, into strings.
            pairs = [(char, int(id)) for id, char in pairs if id.isdecimal() and len(id) < 8]
        if not all(type(id) is int for _, id in pairs) or sorted(id for _, id in pairs) != list(range(len(value))):
            raise ImportFailed(f"{path} must give each of its {len(value)} symbols one id from 0 on")
        value = [char for char, _ in sorted(pairs, key=lambda pair: pair[1])]
    if not isinstance(value, list) or not value or not all(isinstance(char, str) and len(char) == 1 for char in value):
        raise ImportFailed(f"{path} must be a list of characters, an object of characters and ids, or a charlm vocab.json")
    if len(set(value)) != len(value):
        raise ImportFailed(f"{path} lists a character twice: {next(char for char in value if value.count(char) > 1)!r}")
    if any("\ud800" <= symbol <= "\udfff" for symbol in value):
        raise ImportFailed(f"{path} has a symbol that is half of a surrogate pair")
    return Vocab.from_chars(value), "".join(value)
