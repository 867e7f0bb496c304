"""Check the arguments of the Python API against the annotations of its functions, so that an error names the argument."""

import functools
import inspect
import numbers
import os
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, Union, get_args, get_origin

import numpy as np

from charlm.system.errors import ConfigError, short

_P = ParamSpec("_P")
_R = TypeVar("_R")
_C = TypeVar("_C", bound=type)
# Values that are no instances of a type but are used like them, such as those of NumPy.
_ALSO: Mapping[Any, tuple[type, ...]] = {
    int: (numbers.Integral,),
    float: (numbers.Real,),
    bool: (np.bool_,),
    Path: (os.PathLike,),
}


def check_arguments(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Return a function that raises ConfigError if an argument does not have the type that its annotation names.

    An argument without an annotation is not checked. The error names the argument, what was found, and what would work.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def checked(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            kind, annotation = signature.parameters[name].kind, signature.parameters[name].annotation
            if isinstance(annotation, str):  # The name of a class that was not defined yet, or that only type checkers know.
                annotation = function.__globals__.get(annotation, Any)
            for each in value if kind is inspect.Parameter.VAR_POSITIONAL else [value]:
                _check(f"{function.__name__}(): {name}", each, annotation)
        return function(*args, **kwargs)

    return checked


def check_arguments_of_methods(of: _C) -> _C:
    """Return a class whose public methods are those of `check_arguments`."""
    for name, member in list(vars(of).items()):
        if inspect.isfunction(member) and not name.startswith("_"):
            setattr(of, name, check_arguments(member))
    return of


def _check(what: str, value: Any, kind: Any) -> None:
    """Raise ConfigError if a value does not have a type, or is a path that no file can have."""
    if not _has_type(value, kind):
        found = f"{short(repr(value), 80)}, of type {type(value).__name__}"
        raise ConfigError(f"{what} is {found}; it must be of type {_name(kind)}")
    if Path in get_args(kind) and value is not None and not _is_path(value):
        raise ConfigError(f"{what} is {short(repr(value), 80)}; a path has no null character and must be valid Unicode")


def _has_type(value: Any, kind: Any) -> bool:
    """Return whether a value has the type that an annotation names. A type that cannot be checked has every value."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind in (Any, inspect.Parameter.empty):
        return True
    if origin in (Union, types.UnionType):
        return any(_has_type(value, each) for each in inner)
    if kind is not bool and isinstance(value, bool):
        return False
    if origin is None:
        return isinstance(value, (kind, *_ALSO.get(kind, ())))
    if not isinstance(value, origin) or isinstance(value, str | bytes):
        return False
    if issubclass(origin, Mapping):
        return all(_has_type(key, inner[0]) and _has_type(each, inner[1]) for key, each in value.items())
    return not issubclass(origin, Sequence) or origin is tuple or all(_has_type(each, inner[0]) for each in value)


def _is_path(value: str | os.PathLike) -> bool:
    try:
        return b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        return False


def _name(kind: Any) -> str:
    """Return an annotation as it is written."""
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(map(_name, get_args(kind)))
    if kind is types.NoneType:
        return "None"
    if get_origin(kind) is not None and issubclass(get_origin(kind), Callable):
        return "function"
    inner = ", ".join(map(_name, get_args(kind)))
    return getattr(kind, "__name__", str(kind)) + (f"[{inner}]" if inner else "")
