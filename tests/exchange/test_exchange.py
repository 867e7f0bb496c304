"""Models that leave charlm and models that enter it compute the same function, and nothing in a file is executed."""

import importlib.util
import io
import json
import os
import pickle
import struct
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import TEXT, small_model

import charlm
from charlm.config import default_config
from charlm.data.text import play_paths, play_text
from charlm.data.vocab import Vocab
from charlm.exchange.files import read_safetensors, read_state_dict, read_symbols
from charlm.exchange.formats import FORMATS, export_model
from charlm.exchange.import_torch import import_torch
from charlm.exchange.torch_names import ImportFailed, from_torch, to_torch, torch_shapes
from charlm.nn.cells import CELLS
from charlm.runs.flat_state import flatten_state, sha256
from charlm.system.errors import ConfigError, UserError, WorkdirError

pytest.importorskip("safetensors", reason="the extra `export` is not installed")
needs_torch = pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="the extra `parity` is not installed")
needs_onnx = pytest.mark.skipif(
    not (importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnx")),
    reason="the extras `parity` and `export` are not installed",
)
SLOW = pytest.mark.slow
CASES = [(("rnn", 1), SLOW), (("lstm", 2), ()), (("gru", 3), SLOW)]
CASES = [pytest.param(*case, marks=marks) for case, marks in CASES]
ENCODINGS = ["embedding", pytest.param("one_hot", marks=SLOW)]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("cell, layers", CASES)
def test_parameters_come_back_from_torchs_names_to_the_bit(cell, layers, encoding):
    model = small_model(cell, layers, **{"model.encoding": encoding})
    params = jax.tree.map(lambda leaf: leaf.at[..., 0].set(-0.0), model.params)
    arrays = to_torch(model.config.model, params)
    assert {name: array.shape for name, array in arrays.items()} == torch_shapes(model.config.model, model.vocab.size)
    back = flatten_state(from_torch(model.config.model, arrays))
    assert sha256(back) == sha256(flatten_state(params))


def test_tied_weights_come_back_too():
    model = small_model(**{"model.tie_weights": True, "model.embedding_size": 12})
    back = from_torch(model.config.model, to_torch(model.config.model, model.params))
    assert sha256(flatten_state(back)) == sha256(flatten_state(model.params))


def torch_model(model):
    """Return the model as plain PyTorch modules with the exported state dict."""
    import torch

    config, arrays = model.config.model, to_torch(model.config.model, model.params)
    V, H = model.vocab.size, config.hidden_size
    inputs = config.embedding_size if config.encoding == "embedding" else V

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            if config.encoding == "embedding":
                self.embedding = torch.nn.Embedding(V, inputs)
            self.rnn = getattr(torch.nn, config.cell.upper())(inputs, H, config.num_layers)
            self.head = torch.nn.Linear(H, V)

        def forward(self, ids, state=None):
            one_hot = config.encoding == "one_hot"
            x = torch.nn.functional.one_hot(ids, V).float() if one_hot else self.embedding(ids)
            h, state = self.rnn(x, state)
            return self.head(h), state

    net = Net()
    net.load_state_dict({name: torch.tensor(array) for name, array in arrays.items()})
    return net


# A long text and where it is cut. Parts of equal lengths need one program.
LONG, CUTS = (TEXT * 9)[:2103], [3, 703, 1403]


@needs_torch
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("cell, layers", CASES)
def test_pytorch_computes_the_same_logits(cell, layers, encoding):
    import torch

    model = small_model(cell, layers, scale=1.0, **{"model.encoding": encoding})
    net, ids = torch_model(model), model.vocab.encode(LONG).astype(np.int64)
    state, ours = None, None
    for part in np.split(ids[:, None], CUTS):  # The state is carried.
        with torch.no_grad():
            logits, state = net(torch.from_numpy(part), state)
        expected, ours = model.step(part, ours)
        np.testing.assert_allclose(logits.numpy(), expected, atol=1e-5)


@needs_onnx
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("cell, layers", CASES)
def test_onnxruntime_computes_the_same_logits(cell, layers, encoding, tmp_path):
    import onnxruntime

    model = small_model(cell, layers, scale=1.0, **{"model.encoding": encoding})
    export_model(model, "onnx", tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    names = [each.name for each in session.get_inputs()][1:]
    vocab = json.loads(session.get_modelmeta().custom_metadata_map["vocab"])
    assert vocab == model.vocab.to_json() and len(names) == layers * (2 if cell == "lstm" else 1)
    ids = np.stack([model.vocab.encode(LONG), np.roll(model.vocab.encode(LONG), 5)], axis=1).astype(np.int64)
    state = {name: np.zeros((1, 2, 12), np.float32) for name in names}
    ours = None
    for part in np.split(ids, CUTS):
        logits, *last = session.run(None, {"ids": part} | state)
        state = dict(zip(names, last))
        expected, ours = model.step(part, ours)
        np.testing.assert_allclose(logits, expected, atol=1e-5)


@pytest.mark.parametrize("cell, kind", [("lstm", "chars"), pytest.param("gru", "bytes", marks=SLOW)])
def test_the_safetensors_folder_is_loaded_and_samples_the_same_text(cell, kind, tmp_path, run):
    small_model(cell, 2, kind).save(tmp_path / "run")
    flags = f"--workdir={tmp_path / 'run'}", "--format=safetensors", f"--output={tmp_path / 'folder'}"
    assert run("export", *flags)[0] == 0
    assert sorted(each.name for each in (tmp_path / "folder").iterdir()) == [
        *("README.md", "config.json", "model.safetensors", "vocab.json")
    ]
    first, second = charlm.load(tmp_path / "run"), charlm.load(tmp_path / "folder")
    assert sha256(flatten_state(first.params)) == sha256(flatten_state(second.params))
    assert first.sample("the", 50, seed=2) == second.sample("the", 50, seed=2)
    assert first.score(TEXT).nats_per_char == second.score(TEXT).nats_per_char
    card = (tmp_path / "folder" / "README.md").read_text()
    assert f"2 {cell.upper()} layers of 12 units" in card and "library_name: charlm" in card
    code, out, err = run("export", *flags)
    assert code == 2 and "exists already" in err and err.count("\n") == 1
    assert run("sample", f"--workdir={tmp_path / 'folder'}", "--length=20")[0] == 0


@pytest.mark.parametrize("window", [5])
def test_stablehlo_programs_step_and_score(window, tmp_path):
    pytest.importorskip("flatbuffers")
    from jax import export

    model = small_model("lstm", 2)
    export_model(model, "stablehlo", tmp_path / "model.zip", batch=3, window=window)
    with zipfile.ZipFile(tmp_path / "model.zip") as archive:
        about = json.loads(archive.read("about.json"))
        params = dict(np.load(io.BytesIO(archive.read("params.npz"))))
        step, score = (export.deserialize(bytearray(archive.read(name))) for name in ("step", "score"))
    assert step.platforms == ("cpu", "cuda", "tpu") and about["window"] == window
    state = [jnp.zeros(shape, jnp.float32) for shape in about["state"]]
    ids_TB = model.vocab.encode(TEXT[: 3 * (window + 1)]).astype(np.int32).reshape(3, window + 1).T
    expected_TBV, last = model.step(ids_TB)
    ours = state
    for ids_B in ids_TB:
        logits_BV, ours = step.call(params, ids_B, ours)
    np.testing.assert_allclose(logits_BV, expected_TBV[-1], atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, jax.tree.leaves(last))
    nats_TB, _ = score.call(params, ids_TB, state)
    logs = np.asarray(jax.nn.log_softmax(expected_TBV[:-1]))
    np.testing.assert_allclose(nats_TB, -np.take_along_axis(logs, ids_TB[1:, :, None], 2)[..., 0], atol=1e-5)


def test_stablehlo_programs_of_a_huge_batch_need_no_memory_for_it(tmp_path):
    pytest.importorskip("flatbuffers")
    export_model(small_model("rnn"), "stablehlo", tmp_path / "model.zip", batch=1 << 30, window=1)
    with zipfile.ZipFile(tmp_path / "model.zip") as archive:
        assert json.loads(archive.read("about.json"))["state"] == [[1 << 30, 12]]


@pytest.mark.parametrize(
    "change, key",
    [
        ({"model.cell": "ln_lstm"}, "model.cell"),
        ({"model.encoding": "scalar"}, "model.encoding"),
        ({"model.residual": True}, "model.residual"),
        ({"model.learn_initial_state": True}, "model.learn_initial_state"),
    ],
)
def test_what_has_no_counterpart_is_refused_by_name(change, key, tmp_path):
    model = small_model(layers=2, **change)
    for format, suffix in {"torch": ".safetensors", "onnx": ".onnx"}.items():
        with pytest.raises(ConfigError, match=key):
            export_model(model, format, tmp_path / f"out{suffix}")
    assert not list(tmp_path.iterdir())


OF_CELLS = [pytest.param({"model.cell": cell}, marks=() if cell in ("mogrifier_lstm", "slstm") else SLOW) for cell in CELLS]


@pytest.mark.parametrize("change", [*OF_CELLS, {"model.encoding": "scalar"}, {"model.residual": True}], ids=str)
def test_a_folder_of_safetensors_holds_every_model(change, tmp_path):
    model = small_model(layers=2, **change)
    export_model(model, "safetensors", tmp_path / "out")
    again = charlm.load(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, model.params, again.params)
    samples = [each.sample(length=20, seed=3, window=0, random_prompt=None) for each in (model, again)]
    assert samples[0] == samples[1]


def test_a_model_of_documents_leaves_with_its_boundary(tmp_path, run):
    """A folder keeps everything. A file for PyTorch or ONNX computes each document from a state of zeros, and says so."""
    model = small_model("lstm", **{"data.documents": "lines", "eval.context": 0})
    model.save(tmp_path / "run")
    outputs = {"safetensors": "folder", "torch": "state.safetensors"}
    if importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnx"):
        outputs["onnx"] = "model.onnx"
    for format, output in outputs.items():
        flags = f"--workdir={tmp_path / 'run'}", f"--format={format}", f"--output={tmp_path / output}"
        code, _, err = run("export", *flags)
        assert code == 0 and ("with symbol 0, the boundary" in err) == (format != "safetensors"), err
    folder = charlm.load(tmp_path / "folder")
    assert folder.boundary == model.boundary == 0
    assert sha256(flatten_state(folder.params)) == sha256(flatten_state(model.params))
    document = model.vocab.encode("\nthe cat")[:, None].astype(np.int64)
    expected_TV = model.step("at\nthe cat")[0][2:]  # The state before the boundary is forgotten.
    if importlib.util.find_spec("torch"):
        import torch

        with torch.no_grad():
            logits_TBV, _ = torch_model(model)(torch.from_numpy(document))
        np.testing.assert_allclose(logits_TBV[:, 0].numpy(), expected_TV, atol=1e-5)
    if "onnx" in outputs:
        import onnxruntime

        session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
        assert session.get_modelmeta().custom_metadata_map["boundary"] == "0"
        state = {each.name: np.zeros((1, 1, 12), np.float32) for each in session.get_inputs()[1:]}
        logits_TBV, *_ = session.run(None, {"ids": document} | state)
        np.testing.assert_allclose(logits_TBV[:, 0], expected_TV, atol=1e-5)


def test_a_missing_package_is_one_line_that_names_the_extra(monkeypatch, tmp_path):
    import importlib

    model = small_model()

    def refuse(name):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", refuse)
    for format in FORMATS:
        extra = "parity" if format == "torch" else "export"
        with pytest.raises(ConfigError, match=rf"pip install 'charlm\[{extra}\]'"):
            export_model(model, format, tmp_path / "out.pt")
    assert not list(tmp_path.iterdir())


@needs_torch
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_model_goes_to_pytorch_and_back_to_the_bit(encoding, suffix, tmp_path):
    model = small_model("gru", 2, **{"model.encoding": encoding})
    export_model(model, "torch", tmp_path / f"state{suffix}")
    (tmp_path / "vocab.json").write_text(json.dumps(model.vocab.to_json()))
    back = import_torch(tmp_path / f"state{suffix}", tmp_path / "vocab.json")
    assert sha256(flatten_state(back.params)) == sha256(flatten_state(model.params)) and back.vocab == model.vocab


TRAIN_IN_PYTORCH = """
import json, sys
import torch
torch.manual_seed(0)
torch.set_num_threads(1)
text = open(sys.argv[1], encoding="utf-8").read()
symbols = sorted(set(text), key=lambda s: -text.count(s))  # Not the order that charlm uses.
ids = torch.tensor([symbols.index(s) for s in text])

class Net(torch.nn.Module):
    def __init__(self, V=len(symbols), E=10, H=24):
        super().__init__()
        self.encoder = torch.nn.Embedding(V, E)
        self.lstm = torch.nn.LSTM(E, H, 2)
        self.decoder = torch.nn.Linear(H, V)
    def forward(self, x):
        return self.decoder(self.lstm(self.encoder(x))[0])

net = Net()
optimizer = torch.optim.Adam(net.parameters(), 1e-2)
for step in range(100):
    start = torch.randint(0, len(ids) - 33, (8,))
    x = torch.stack([ids[s : s + 33] for s in start], 1)
    loss = torch.nn.functional.cross_entropy(net(x[:-1]).flatten(0, 1), x[1:].flatten())
    optimizer.zero_grad(); loss.backward(); optimizer.step()
torch.save(net.state_dict(), sys.argv[2])
json.dump(symbols, open(sys.argv[3], "w"))
with torch.no_grad():
    print(torch.nn.functional.cross_entropy(net(ids[:1000, None])[:-1, 0].double(), ids[1:1000]).item())
"""


@SLOW
@needs_torch
def test_a_model_that_pytorch_trained_scores_the_same_and_is_trained_further(tmp_path, run):
    import subprocess
    import sys

    play = play_text(play_paths()[0].read_text(encoding="utf-8"))
    (text_file := tmp_path / "play.txt").write_text(play[:20_000], encoding="utf-8")
    files = text_file, tmp_path / "net.pt", tmp_path / "symbols.json"
    script = subprocess.run([sys.executable, "-c", TRAIN_IN_PYTORCH, *files], capture_output=True, text=True, check=True)
    expected = float(script.stdout)
    path = tmp_path / "imported"
    code, _, err = run("import_torch", f"--state_dict={files[1]}", f"--vocab={files[2]}", f"--workdir={path}")
    assert code == 0, err
    model = charlm.load(path)
    text = text_file.read_text(encoding="utf-8")
    with model.config.unlocked():
        model.config.eval.num_streams = 1
    assert model.score(text[:1000]).nats_per_char == pytest.approx(expected, abs=1e-5)
    (tmp_path / "part.txt").write_text(text[:1000], encoding="utf-8")
    assert run("evaluate", f"--workdir={path}", f"--text={tmp_path / 'part.txt'}", "--json")[0] == 0
    assert run("sample", f"--workdir={path}", "--length=10")[0] == 0
    code, out, err = run("reproduce", f"--workdir={path}")
    assert code == 2 and "net.pt" in err and err.count("\n") == 1
    config = default_config()
    config.data.path, config.train.init_from, config.train.steps = str(text_file), str(path), 60
    config.model.update(model.config.model.to_dict())
    config.optimizer.learning_rate = 5e-3
    better = charlm.fit(config, tmp_path / "better", progress=False)
    assert better.score(text[:1000]).nats_per_char < expected - 0.05


class Evil:
    """Unpickling it would make a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@needs_torch
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, run):
    import torch

    state = {"rnn.weight_ih_l0": torch.zeros(4, 4), "x": Evil(str(tmp_path / "made"))}
    torch.save(state, tmp_path / "zip.pt")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Evil(str(tmp_path / "made"))))
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "noise.pt").write_bytes(os.urandom(1000))
    (tmp_path / "vocab.json").write_text('["a", "b"]')
    for name in ("zip", "old", "plain", "list", "noise", "absent"):
        flags = f"--state_dict={tmp_path / name}.pt", f"--vocab={tmp_path / 'vocab.json'}", f"--workdir={tmp_path / 'run'}"
        code, out, err = run("import_torch", *flags)
        assert code == 2 and err.startswith("charlm: ") and err.count("\n") == 1 and f"{name}.pt" in err, err
        assert not (tmp_path / "made").exists() and not (tmp_path / "run").exists() and not out


def test_a_damaged_safetensors_file_is_one_line(tmp_path, run):
    export_model(small_model(), "safetensors", tmp_path / "folder")
    file = tmp_path / "folder" / "model.safetensors"
    whole = file.read_bytes()
    size = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + size])
    header["head.weight"]["shape"] = [1 << 40, 1 << 20]
    huge = json.dumps(header).encode()
    other = json.loads(whole[8 : 8 + size])
    other["head.weight"]["shape"] = other["head.weight"]["shape"][::-1]
    turned = json.dumps(other).encode()
    for content in [
        *(b"", b"x", whole[:100], whole[:-1], whole + b"more", b"\xff" * 1000),
        struct.pack("<Q", 1 << 60) + whole[8:],
        struct.pack("<Q", len(huge)) + huge + whole[8 + size :],
        struct.pack("<Q", len(turned)) + turned + whole[8 + size :],
    ]:
        file.write_bytes(content)
        code, out, err = run("sample", f"--workdir={tmp_path / 'folder'}")
        assert code == 2 and err.startswith("charlm: ") and err.count("\n") == 1 and "model.safetensors" in err and not out, err


@pytest.mark.parametrize(
    "content, found",
    [
        ('["b", "a"]', "ba"),
        ('{"b": 0, "a": 1}', "ba"),
        ('{"0": "b", "1": "a"}', "ba"),
        ('{"kind": "chars", "symbols": "ab"}', "ab"),
        ('["a", "a"]', None),
        ('["ab"]', None),
        ('{"a": 0, "b": 2}', None),
        ('{"a": true}', None),
        ("[]", None),
        ("7", None),
        ('{"kind": "chars", "symbols": "ba"}', None),
    ],
)
def test_vocabulary_files(content, found, tmp_path):
    (tmp_path / "vocab.json").write_text(content)
    if found is None:
        with pytest.raises(ImportFailed, match=r"vocab\.json"):
            read_symbols(tmp_path / "vocab.json")
    else:
        vocab, symbols = read_symbols(tmp_path / "vocab.json")
        assert vocab.kind == "chars" and symbols == found and vocab.symbols == "".join(sorted(found))


def save(path, **arrays):
    from safetensors.numpy import save_file

    save_file({name.replace("__", "."): np.asarray(array, np.float32) for name, array in arrays.items()}, path)
    return path


LSTM = {"weight_ih_l0": np.ones((8, 3)), "weight_hh_l0": np.ones((8, 2))}


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({}, "must hold one nn.RNN"),
        ({"a__weight_ih_l0": np.ones((8, 3)), "b__weight_ih_l0": np.ones((8, 3))}, "found 2 of them"),
        ({f"r__{name}": array for name, array in LSTM.items()}, "head was not recognised"),
        ({"weight_ih_l0": np.ones((8, 3)), "weight_hh_l0": np.ones((7, 2))}, "1, 3 or 4 times"),
        (LSTM | {"weight_ih_l0_reverse": np.ones((8, 3))}, "bidirectional"),
        (LSTM | {"weight_hr_l0": np.ones((8, 3))}, "projection"),
        (LSTM | {"weight_ih_l3": np.ones((8, 2)), "weight_hh_l3": np.ones((8, 2))}, "weight_ih_l1 should have shape"),
        (LSTM | {"head__weight": np.ones((5, 2))}, "no embedding of 5 symbols"),
        (LSTM | {"head__weight": np.ones((3, 2)), "norm__weight": np.ones(2)}, "holds more than"),
        (LSTM | {"head__weight": np.full((3, 2), np.nan)}, "not finite"),
    ],
)
def test_a_state_dict_without_such_a_model_is_refused(arrays, message, tmp_path):
    file = save(tmp_path / "x.safetensors", **arrays)
    (tmp_path / "vocab.json").write_text('["a", "b", "c"]')
    with pytest.raises(ImportFailed, match=message) as caught:
        import_torch(file, tmp_path / "vocab.json")
    assert "\n" not in str(caught.value)


def test_a_model_without_biases_and_with_ambiguous_shapes_is_imported_by_name(tmp_path):
    draw = np.random.default_rng(0)
    arrays = {"r__weight_ih_l0": draw.normal(size=(8, 2)), "r__weight_hh_l0": draw.normal(size=(8, 2))}
    arrays |= {"inside__weight": draw.normal(size=(3, 2)), "outside__weight": draw.normal(size=(3, 2))}
    file = save(tmp_path / "x.safetensors", **arrays)
    (tmp_path / "vocab.json").write_text('["c", "a", "b"]')
    with pytest.raises(ImportFailed, match="found several candidates: inside, outside"):
        import_torch(file, tmp_path / "vocab.json")
    said = []
    model = import_torch(file, tmp_path / "vocab.json", "inside", "outside", said.append)
    assert len(said) == 3 and model.vocab.symbols == "abc"
    np.testing.assert_array_equal(model.params["embedding"], arrays["inside__weight"][[1, 2, 0]].astype(np.float32))
    np.testing.assert_array_equal(model.params["head_W"].T, arrays["outside__weight"][[1, 2, 0]].astype(np.float32))


@needs_torch
@needs_onnx
@pytest.mark.parametrize(
    "format, name",
    [
        ("safetensors", "f"),
        *(pytest.param(*case, marks=SLOW) for case in [("torch", "f.pt"), ("torch", "f.safetensors"), ("onnx", "f.onnx")]),
    ],
)
def test_a_full_disk_is_one_line_and_leaves_nothing(format, name, tmp_path):
    import subprocess
    import sys

    small_model().save(tmp_path / "run")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / f"{name}.partial").write_text("precious")
    flags = f"--workdir={tmp_path / 'run'} --format={format} --output={tmp_path / 'out' / name}"
    command = f"ulimit -f 4; trap '' XFSZ; {sys.executable} -m charlm.export {flags}"
    found = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert found.returncode == 1 and found.stderr.startswith("charlm: cannot write "), found.stderr
    assert found.stderr.count("\n") == 1 and [each.name for each in (tmp_path / "out").iterdir()] == [f"{name}.partial"]


def test_a_changed_folder_is_noticed(tmp_path):
    model = small_model(**{"model.embedding_size": 12})
    for name in ("bits", "vocab", "kind", "tied"):
        export_model(model, "safetensors", tmp_path / name)
    weights = tmp_path / "bits" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-9] ^= 1
    weights.write_bytes(content)
    vocab = json.loads((tmp_path / "vocab" / "vocab.json").read_text())
    vocab["symbols"] = vocab["symbols"][:-1] + "{"
    (tmp_path / "vocab" / "vocab.json").write_text(json.dumps(vocab))
    for name, group, key, value in [("kind", "data", "vocab", "bytes"), ("tied", "model", "tie_weights", True)]:
        config = json.loads((tmp_path / name / "config.json").read_text())
        config[group][key] = value
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    for name, message in [
        ("bits", "sha256 does not match"),
        ("vocab", "another vocabulary"),
        ("kind", "another vocabulary"),
        ("tied", "tie_weights"),
    ]:
        with pytest.raises(UserError, match=message):
            charlm.load(tmp_path / name)


def test_the_unknown_symbol_and_overflowing_biases(tmp_path):
    vocab = Vocab.from_chars("ab", unknown=True)
    (tmp_path / "vocab.json").write_text(json.dumps(vocab.to_json()))
    arrays = {"r__weight_ih_l0": np.ones((2, 3)), "r__weight_hh_l0": np.ones((2, 2)), "head__weight": np.ones((3, 2))}
    model = import_torch(save(tmp_path / "x.safetensors", **arrays), tmp_path / "vocab.json")
    assert model.vocab == vocab and model.score("axb").total.count == 2
    biases = {"r__bias_ih_l0": np.full(2, 3e38), "r__bias_hh_l0": np.full(2, 3e38)}
    with pytest.raises(ImportFailed, match="not finite"):
        import_torch(save(tmp_path / "y.safetensors", **arrays, **biases), tmp_path / "vocab.json")
    for name, array, message in [("head__bias", np.ones(5), "head.bias has shape"), ("head__bias", np.ones(()), "vectors and")]:
        with pytest.raises(ImportFailed, match=message):
            import_torch(save(tmp_path / "z.safetensors", **arrays, **{name: array}), tmp_path / "vocab.json")


@needs_torch
def test_parameters_and_sparse_tensors_of_pytorch(tmp_path):
    import torch

    torch.save({"a": torch.nn.Parameter(torch.ones(2, 2))}, tmp_path / "a.pt")
    assert read_state_dict(tmp_path / "a.pt")["a"].tolist() == [[1, 1], [1, 1]]
    torch.save({"a": torch.eye(3).to_sparse()}, tmp_path / "b.pt")
    with pytest.raises(ImportFailed, match="sparse"):
        read_state_dict(tmp_path / "b.pt")


def test_wrong_flags_of_an_export_are_refused(tmp_path, run):
    small_model().save(tmp_path / "run")
    workdir = f"--workdir={tmp_path / 'run'}"
    for flags, message in [
        ((workdir, "--format=hdf5", "--output=x"), "must be one of safetensors, torch, onnx, stablehlo"),
        ((workdir, "--format=onnx"), "--output is missing"),
        ((workdir, "--format=onnx", "--batch=3", f"--output={tmp_path / 'x'}"), "--batch is for --format stablehlo"),
        ((workdir, "--format=torch", f"--output={tmp_path / 'x'}"), "must end in .pt"),
        ((workdir, "--format=onnx", f"--output={tmp_path / 'no' / 'x'}"), "does not exist"),
        ((workdir, "--format=onnx", f"--output={tmp_path / 'run' / 'vocab.json'}"), "exists already"),
        ((f"--workdir={tmp_path / 'no'}", "--format=onnx", f"--output={tmp_path / 'x'}"), "does not exist"),
    ]:
        code, out, err = run("export", *flags)
        assert code == 2 and message in err and err.count("\n") == 1 and not out, err


def test_reading_refuses_other_arrays(tmp_path):
    file = save(tmp_path / "x.safetensors", a=np.ones(3))
    assert read_safetensors(file, {"a": (3,)})["a"].shape == (3,)
    for shapes, message in [({"a": (4,)}, "asks for F32"), ({}, "asks for absent"), ({"a": (3,), "b": (1,)}, "lacks b")]:
        with pytest.raises(ImportFailed, match=message):
            read_safetensors(file, shapes)
    with pytest.raises(ImportFailed, match="has suffix"):
        read_state_dict(tmp_path / "x.npz")
    with pytest.raises(WorkdirError):
        read_symbols(tmp_path / "absent.json")
