"""A wrong argument of the Python API is one line that names the argument, what was found, and what would work."""

from pathlib import Path

import numpy as np
import pytest

import charlm
from charlm import sweep
from charlm.config import default_config
from charlm.data.vocab import Vocab
from charlm.system.arguments import check_arguments
from charlm.system.errors import ConfigError, CorpusError, UserError

VALUES = [None, 5, 2.5, True, "x", b"x", [1], {}, object(), np.array([1.5]), Path("x"), len]
NONE, PATHS, FUNCTION = type(None), (str, type(Path())), type(len)


@pytest.mark.parametrize(
    "call, name, right",
    [
        (lambda model, value: charlm.load(value), "path", PATHS),
        (lambda model, value: charlm.load("x", value), "checkpoint", (str, int)),
        (lambda model, value: charlm.load("x", cell_module=value), "cell_module", (str, NONE)),
        (lambda model, value: charlm.fit(value, "x"), "config", ()),
        (lambda model, value: charlm.fit(model.config, value), "workdir", PATHS),
        (lambda model, value: charlm.fit(model.config, "x", value), "text", (str, NONE)),
        (lambda model, value: charlm.fit(model.config, "x", callback=value), "callback", (NONE, FUNCTION)),
        (lambda model, value: charlm.fit(model.config, "x", progress=value), "progress", (bool,)),
        (lambda model, value: model.sample(value), "prompt", (str, NONE)),
        (lambda model, value: model.sample(length=value), "length", (int, NONE)),
        (lambda model, value: model.sample(temperature=value), "temperature", (int, float, NONE)),
        (lambda model, value: model.sample(seed=value), "seed", (int,)),
        (lambda model, value: model.stream(stop=value), "stop", (str, NONE)),
        (lambda model, value: model.score(value), "text", (str,)),
        (lambda model, value: model.evaluate(file=value), "file", (*PATHS, NONE)),
        (lambda model, value: model.next(value), "text", (str,)),
        (lambda model, value: model.next("x", value), "k", (int,)),
        (lambda model, value: model.states("x", value), "gates", (bool,)),
        (lambda model, value: model.step(value), "symbols", (str, list, np.ndarray)),
        (lambda model, value: model.step("x", value), "state", (NONE,)),
        (lambda model, value: model.initial_state(value), "batch_size", (int,)),
        (lambda model, value: model.save(value), "path", PATHS),
        (lambda model, value: model.save("x", value), "origin", (NONE, dict)),
        (lambda model, value: charlm.TextScore(None, None, None, None).compare(value), "other", ()),
        (lambda model, value: sweep.product(value), "values", (dict,)),
        (lambda model, value: sweep.product({"seed": value}), "values", (list,)),
        (lambda model, value: sweep.chain([], value), "parts", ()),
        (lambda model, value: sweep.sample(1, {"seed": value}), "draws", ()),
        (lambda model, value: sweep.log_uniform(value, 9), "low", (int, float)),
        (lambda model, value: sweep.integer(0, value), "high", (int,)),
    ],
)
def test_an_argument_of_the_wrong_type_is_named(call, name, right, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = default_config()
    config.data.path = "absent.txt"  # So that nothing is trained by mistake.
    model = charlm.LanguageModel(config.lock(), Vocab.from_chars("abx"), None)
    for value in VALUES:
        if type(value) not in right:
            with pytest.raises(ConfigError, match=rf"\(\): {name} is .*, of type \w+; it must be of type") as caught:
                call(model, value)
            assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    assert not list(tmp_path.iterdir())


def test_values_that_are_used_like_the_type_are_taken():
    @check_arguments
    def function(number: float, path: str | Path, *names: str, flag: bool = False) -> tuple:
        return number, path, names, flag

    assert function(np.int64(3), Path("x"), "a", flag=np.True_) == (3, Path("x"), ("a",), True)
    with pytest.raises(TypeError, match="missing a required argument"):
        function(3)


@pytest.mark.parametrize("path", ["a\0b", "\ud800"])
def test_a_path_that_no_file_can_have_is_refused(path):
    for call in (charlm.load, lambda path: charlm.fit(default_config(), path)):
        with pytest.raises(ConfigError, match="a path has no null character"):
            call(path)


def test_values_of_the_right_type_that_mean_nothing_are_refused():
    model = charlm.LanguageModel(default_config().lock(), Vocab.from_chars("abx"), None)
    for call, message in [
        (lambda: model.initial_state(-1), "batch_size is -1"),
        (lambda: model.next("a", 0), "k is 0; it must be above 0"),
        (lambda: model.step([[0], [0, 1]]), "the symbols have no shape"),
        (lambda: charlm.fit(type(default_config())(), "x", text="abc"), "is missing; start from default_config"),
        (lambda: sweep.log_uniform(0, 1), "low is 0"),
        (lambda: sweep.uniform_between(1.0, float("nan")), "empty or not finite"),
        (lambda: sweep.integer(3, 2), "the range from 3 to 2"),
        (lambda: sweep.choice([]), "at least one"),
        (lambda: sweep.sample(-1, {}), "num_runs is -1"),
    ]:
        with pytest.raises(UserError, match=message):
            call()
    with pytest.raises(CorpusError):
        model.score("z")
