"""A trained model: sample from it, score texts with it, and look into it. The commands `sample` and `evaluate` use it too."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from ml_collections import ConfigDict

from charlm.data.corpus import Corpus
from charlm.data.documents import Documents
from charlm.data.encode import encode_text
from charlm.data.vocab import Vocab
from charlm.inference import decoding, sampler, states
from charlm.inference.prompt import make_prompt, start_text
from charlm.inference.scorer import Score, Scorer, make_scorer, min_text_length
from charlm.inference.states import State, Step
from charlm.inference.text_score import TextScore
from charlm.nn.model import CharLM
from charlm.runs.curves import curves_figure
from charlm.runs.evaluation import evaluate
from charlm.runs.prompts import draw_each
from charlm.runs.run_corpus import load_run_corpus
from charlm.runs.sample_options import Start, with_sample_options
from charlm.runs.saved_model import write_model
from charlm.runs.tracking import read_metrics
from charlm.runs.workdir import check_corpus
from charlm.system.arguments import check_arguments_of_methods
from charlm.system.errors import ConfigError, CorpusError, WorkdirError
from charlm.system.progress import ByteProgress

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@check_arguments_of_methods
@dataclasses.dataclass(frozen=True, eq=False)
class LanguageModel:
    """A recurrent language model with its parameters. `charlm.load` and `charlm.fit` return it.

        model = charlm.load("runs/quickstart")
        print(model.sample("HAMLET:", length=300, temperature=0.8, seed=1))
        print(model.score("To be, or not to be").bits_per_char)

    Programs are compiled when a method first needs them. `dataclasses.replace(model, params=...)` has other parameters.

    Attributes:
        config: the run's config, locked. It defines how texts are scored (`config.eval`) and sampled (`config.sample`).
        vocab: the map between symbols and ids.
        params: the tree of parameters, float32. `charlm.nn.model` describes their shapes.
        num_steps: the number of training steps.
        path: the folder that the model comes from; None: no folder.
        manifest: what the run's numbers depend on besides the config.
    """

    config: ConfigDict
    vocab: Vocab
    params: Any
    num_steps: int = 0
    path: Path | None = None
    manifest: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        model = self.config.model
        layers, where = f"{model.num_layers} x " if model.num_layers > 1 else "", f", {self.path}" if self.path else ""
        return (
            f"LanguageModel({layers}{model.cell} {model.hidden_size}, {self.vocab.size} symbols, step {self.num_steps}{where})"
        )

    @functools.cached_property
    def module(self) -> CharLM:
        """The Flax module. `module.apply({"params": params}, ids_TB, carry)` returns logits and the next carry."""
        return CharLM.from_config(self.config.model, self.vocab.size, self.boundary)

    @functools.cached_property
    def boundary(self) -> int | None:
        """The id of the symbol between the documents of the training text; None if it has no documents."""
        return self._documents and self._documents.boundary_id(self.vocab)

    @functools.cached_property
    def _documents(self) -> Documents | None:
        return Documents.from_config(self.config.data)

    def sample(
        self,
        prompt: str | Sequence[str] | None = None,
        length: int | None = None,
        temperature: float | None = None,
        *,
        top_k: int | None = None,
        top_p: float | None = None,
        greedy: bool | None = None,
        seed: int = 0,
        num_samples: int | None = None,
        stop: str | None = None,
        random_prompt: int | None = None,
        window: int | None = None,
        dtype: str | None = None,
        prompts_at_once: int = 1,
    ) -> str | list[str]:
        """Return text that continues a prompt, without the prompt. The command `sample` draws the same text.

        An argument that is None has the value of `config.sample`, except `num_samples`.

        Args:
            prompt: the text to continue; without one, the sample starts after a line break. Of a list, each has one sample. For
                documents it is the beginning of one, and a sample is the rest of it.
            length: the number of characters to draw; of bytes for the byte vocabulary.
            temperature: the divisor of the logits. Values below 1 prefer probable symbols.
            top_k: draw only from the k most probable symbols.
            top_p: draw only from the most probable symbols that together reach probability p.
            greedy: whether to always take the most probable symbol.
            seed: the seed. The same seed gives the same text.
            num_samples: the number of samples; None: one.
            stop: the string that ends a sample early. It is not part of the sample.
            random_prompt: without a prompt: continue this many symbols from a random place in the training text.
            window: read this many last symbols again before each draw; 0: carry the state.
            dtype: the dtype of the weights: float32 or bfloat16.
            prompts_at_once: of a list of prompts, draw up to this many together (`prompts.draw_each`).

        Returns:
            A string; a list of strings if `num_samples` is given, or if `prompt` is a list.

        Raises:
            ConfigError: an argument is out of range, or the prompt has a symbol that is not in the vocabulary.
        """
        named = {"prompt": prompt, "length": length, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        named |= {"greedy": greedy, "random_prompt": random_prompt, "window": window, "dtype": dtype}
        if isinstance(prompt, list | tuple):
            drawn = draw_each(self, prompt, named | {"num_samples": num_samples}, seed, stop, prompts_at_once)
            return ["".join(text for (text,) in pieces) for _, pieces in drawn]
        if prompts_at_once != 1:
            raise ConfigError(f"prompts_at_once is {prompts_at_once}, but there is one prompt; give a list of prompts")
        _, pieces = self.draw(named | {"num_samples": 1 if num_samples is None else num_samples}, seed, stop)
        texts = ["".join(parts) for parts in zip(*pieces)]
        return texts[0] if num_samples is None else texts

    def stream(self, prompt: str | None = None, *, seed: int = 0, stop: str | None = None, **named: Any) -> Iterator[str]:
        """Yield the text of `sample(prompt, seed=seed, stop=stop, **named)` in pieces, as it is drawn."""
        if "num_samples" in named:
            raise ConfigError("stream() draws one sample; sample() draws several")
        _, pieces = self.draw({"prompt": prompt, "num_samples": 1, **named}, seed, stop)
        return (text for (text,) in pieces if text)

    def draw(self, named: Mapping[str, Any], seed: int, stop: str | None = None) -> tuple[str, Iterator[list[str]]]:
        """Return the prompt, as the model reads it, and an iterator over the new text of each sample. See `start`."""
        start = self.start(named, seed, stop)
        return start.prompt, self.draw_from(start)

    def start(self, named: Mapping[str, Any], seed: int, stop: str | None = None, first: int = 0) -> Start:
        """Return what samples start from.

        Args:
            named: values for keys of `config.sample`; None: that of the config.
            seed: the seed.
            stop: the string that ends a sample.
            first: the number of earlier samples with this seed, which have other random keys.

        Raises ConfigError as `sample` does.
        """
        config, vocab = with_sample_options(self.config, named, seed, stop, self.vocab.size), self.vocab
        settings = config.sample
        train_ids = self.corpus().train if settings.random_prompt is not None and not settings.prompt else None
        prompt, prompt_ids = make_prompt(config, vocab, train_ids, seed)
        how = sampler.Settings.from_config(settings, vocab.size)
        keys_N = sampler.sample_keys(seed, settings.num_samples, first)
        compiled = self.make_sampler(settings.window, settings.dtype)
        stops = [each for each in (stop, self._documents and self._documents.boundary) if each]
        return Start(prompt, prompt_ids, keys_N, settings.length, how, stops, compiled)

    def draw_from(self, start: Start) -> Iterator[list[str]]:
        """Yield the new text of each sample, as it is drawn."""
        ids = sampler.generate(start.sampler, self.params, self.vocab, start.ids, start.keys_N, start.length, start.settings)
        return decoding.decode_samples(ids, self.vocab, len(start.keys_N), start.stops)

    def score(self, text: str) -> TextScore:
        """Return the cross-entropy of a text. The command `evaluate --text` prints the same loss.

        For documents the text is split as the training text is, and a boundary stands before each document and after the last.

        Args:
            text: a text of at least two symbols; for a many-to-one model, more than `batching.seq_len`.

        Raises:
            CorpusError: the text is too short, or has a symbol that is not in the vocabulary.
        """
        ids = self._encode(text, split=True)
        found = self.score_ids("the text", ids, per_symbol=True)
        return TextScore(ids, self.vocab, found.nats_N, found)

    def evaluate(
        self, split: str = "val", file: str | Path | None = None, dynamic: bool = False, per_document: bool = False
    ) -> dict[str, Any]:
        """Return what the command `evaluate --json` prints: the loss on a text in every unit.

        Args:
            split: `train`, `val` or `test`, a part of the run's corpus.
            file: a UTF-8 text file to score instead.
            dynamic: report a second loss, that of a model that learns from the text that it has scored.
            per_document: report the loss of each document too (`text_score.document_scores`).

        Raises:
            WorkdirError: the corpus of the run has changed.
            CorpusError: the text cannot be read, is too short, or has a symbol that is not in the vocabulary.
            ConfigError: dynamic evaluation is not possible for this run, or its text has no documents.
        """
        return evaluate(self, split, file, dynamic, per_document)

    def next(self, text: str = "", k: int = 10) -> list[tuple[str | bytes, float]]:
        """Return the k most probable symbols after a text, with their probabilities, the most probable first.

        Args:
            text: the text; an empty one is read as a line break, as in `sample`. For documents it is the beginning of one.
            k: the number of symbols.

        Returns:
            (symbol, probability): the symbol is a character, or one byte for the byte vocabulary.

        Raises:
            ConfigError: k is not above 0.
            CorpusError: the text has a symbol that is not in the vocabulary.
        """
        states.check_count("k", k)
        if self._documents or text == "":
            text = start_text(self.vocab, self._documents) + text
        ids_N = self._encode(text)[-self.config.sample.window :]  # 0: all of them.
        logits_1V, _ = states.step_through(self._step, self.params, ids_N, self.initial_state())
        return states.most_probable(logits_1V[0], self.vocab, k)

    def states(self, text: str, gates: bool = False) -> dict[str, np.ndarray]:
        """Return the state of every layer at every symbol of a text, from the initial state on.

        Args:
            text: a text of at least one symbol.
            gates: whether to return the values of the gates too.

        Returns:
            {name: float32 array (n, H)} for n symbols and H units. Row t is that after symbol t. The carry of the first layer
            is `layer_0.h`, and for an LSTM `layer_0.c`. Its gates are `layer_0.gate_i`, `layer_0.gate_f` and so on, in the
            order of `charlm.nn.cells.Cell.gates`.

        Raises:
            CorpusError: the text is empty, or has a symbol that is not in the vocabulary.
            ConfigError: the cell does not show its gates.
        """
        if gates:
            states.check_gates(self.module)
        ids = self._encode(text)
        if not len(ids):
            raise CorpusError("the text is empty; a state needs at least one symbol")
        return self._recorder(gates)(self.params, ids)

    def initial_state(self, batch_size: int = 1) -> State:
        """Return the state at the start of a text: for each layer a tuple of arrays (batch_size, H)."""
        states.check_count("batch_size", batch_size)
        return self.module.initial_carry(self.params, batch_size)

    def step(
        self, symbols: str | Sequence[Any] | np.ndarray | jax.Array, state: State | None = None
    ) -> tuple[jax.Array, State]:
        """Return the logits after each symbol, and the state after the last one. This is all that a recurrent model does.

            logits, state = model.step("To be", None)
            logits, state = model.step(", or not", state)

        Args:
            symbols: a text, or ids of shape (T,) for one text, or (T, B) for B texts.
            state: the state before the first symbol; None: the initial state.

        Returns:
            Logits of shape (T, V), or (T, B, V) for ids of shape (T, B), and a state like that of `initial_state`. Each T and
            B is compiled once.

        Raises:
            CorpusError: a symbol is not in the vocabulary.
        """
        ids = self._encode(symbols) if isinstance(symbols, str) else symbols
        ids = states.check_ids(ids, self.vocab.size)
        ids_TB = (ids[:, None] if ids.ndim == 1 else ids).astype(np.int32)
        initial = self.initial_state(ids_TB.shape[1])
        if state is not None:
            states.check_state(state, initial)
        logits_TBV, state = self._step(self.params, ids_TB, initial if state is None else state)
        return (logits_TBV[:, 0] if ids.ndim == 1 else logits_TBV), state

    def metrics(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl, one dict each. `pandas.DataFrame(model.metrics())` is a table of them."""
        return read_metrics(self._folder() / "metrics.jsonl")

    def plot(self) -> "Figure":
        """Return the curves of the run as a matplotlib figure: the losses, and a panel for each selected metric."""
        return curves_figure(self.metrics())

    def save(self, path: str | Path, origin: Mapping[str, Any] | None = None) -> None:
        """Write the model into a new workdir, which the commands and `charlm.load` read.

        Training in it starts at step 0 from these parameters, with a new state of the optimizer.

        Args:
            path: the folder.
            origin: where the model comes from, for the manifest; None: the folder that it was loaded from.

        Raises:
            WorkdirError: the folder holds something.
        """
        origin = origin or {"from": None if self.path is None else str(self.path), "step": self.num_steps}
        write_model(Path(path), self.config, self.vocab, self.params, self.manifest, origin, self.path)

    def corpus(self) -> Corpus:
        """Return the corpus of the run. Raises WorkdirError if it is not the corpus that the run was trained on."""
        corpus = load_run_corpus(self.config, self.path, self.manifest)
        check_corpus(self.path or "this model", self.manifest, corpus, self.vocab)
        return corpus

    def make_sampler(self, window: int, dtype: str | None) -> sampler.Sampler:
        """Return `sampler.make_sampler` of this model, with this window and with weights of this dtype."""
        return sampler.make_sampler(self.module, self.vocab, window, dtype)

    @functools.cached_property
    def _scorer(self) -> Scorer:
        return make_scorer(self.module, self.vocab, self.config.batching, metrics=self.config.eval.metrics)

    @functools.cached_property
    def _step(self) -> Step:
        return states.make_step(self.module)

    @functools.cached_property
    def _recorder(self) -> Any:
        return functools.cache(lambda gates: states.record_states(self.module, gates))

    def _folder(self) -> Path:
        """Return the folder of the run. Raises WorkdirError if there is none."""
        if self.path is None:
            raise WorkdirError("this model comes from no workdir, so it has no metrics")
        return self.path

    def _encode(self, text: str, split: bool = False) -> np.ndarray:
        return encode_text(text, self.vocab, self.config.data.lowercase, self._documents if split else None)

    def score_ids(self, name: str, ids: np.ndarray, per_symbol: bool = False) -> Score:
        """Return the score of a text of ids, shape (symbols,). `name` is that of the text in messages."""
        if len(ids) < (shortest := min_text_length(self.config.batching)):
            raise CorpusError(f"{name} has {len(ids)} characters; a score needs at least {shortest}")
        with ByteProgress(f"scoring {name}", ids.nbytes) as progress:
            return self._scorer(
                self.params, ids, self.config.eval, lambda done: progress.set_done(done * ids.nbytes), per_symbol
            )
