"""A trained model with its run, for the commands `sample` and `evaluate`."""

import copy
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from charlm.data.corpus import Corpus, load_corpus
from charlm.data.vocab import UNKNOWN, Vocab
from charlm.inference import sampler
from charlm.inference.dynamic import dynamic_cross_entropy
from charlm.inference.scorer import Score, make_scorer, min_text_length
from charlm.nn.model import CharLM
from charlm.runs.checkpoint import Checkpoints
from charlm.runs.flat_state import eval_params, state_shapes
from charlm.runs.memory import check_memory
from charlm.runs.workdir import Run, check_corpus
from charlm.system.errors import ConfigError, CorpusError
from charlm.system.progress import ByteProgress, say


class TrainedModel(NamedTuple):
    """A model and the parameters of one of its checkpoints.

    Attributes:
        run: the run that trained it.
        model: its architecture.
        params: its parameters.
        step: the checkpoint's step.
    """

    run: Run
    model: CharLM
    params: Any
    step: int

    def corpus(self) -> Corpus:
        """Return the corpus of the run. Raises WorkdirError if it is not the corpus that the run was trained on."""
        corpus = load_corpus(self.run.config.data)
        check_corpus(self.run.path, self.run.manifest, corpus)
        return corpus

    def sample(self, settings: ConfigDict, seed: int) -> tuple[str, Iterator[np.ndarray]]:
        """Return the prompt and an iterator over the ids that follow it, in pieces of shape (num_samples, up to K).

        Args:
            settings: like `config.sample`.
            seed: changing it changes the text.

        Raises:
            ConfigError: the prompt does not fit the vocabulary or the window.
        """
        run = self.run
        config = copy.deepcopy(run.config)
        config.sample = settings
        check_memory(config, run.vocab.size, training=False)
        train_ids = self.corpus().train if settings.random_prompt is not None and not settings.prompt else None
        prompt, prompt_ids = sampler.make_prompt(config, run.vocab, train_ids, seed)
        how = sampler.Settings.from_config(settings, run.vocab.size)
        keys_N = sampler.sample_keys(seed, settings.num_samples)
        compiled = sampler.make_sampler(self.model, run.vocab, settings.window, settings.dtype)
        return prompt, sampler.generate(compiled, self.params, run.vocab, prompt_ids, keys_N, settings.length, how)

    def score(self, name: str, ids: np.ndarray, dynamic: bool = False) -> dict[str, Any]:
        """Return the loss on a text in every unit, with the counts that belong to it.

        Args:
            name: the name of the text, for messages.
            ids: the text in the run's vocabulary, shape (symbols,).
            dynamic: also report the loss under dynamic evaluation; its keys begin with `dynamic_`.

        Raises:
            CorpusError: the text is too short.
            ConfigError: dynamic evaluation is not possible for this run.
        """
        run = self.run
        if len(ids) < (shortest := min_text_length(run.config.batching)):
            raise CorpusError(f"{name} has {len(ids)} characters; a score needs at least {shortest}")
        train_ids = self._text_for_dynamic_evaluation() if dynamic else None
        with ByteProgress(f"scoring {name}", ids.nbytes) as progress:
            scorer = make_scorer(self.model, run.vocab, run.config.batching, metrics=run.config.eval.metrics)
            score = scorer(self.params, ids, run.config.eval, lambda done: progress.set_done(done * ids.nbytes))
        found = {"text": name, "checkpoint": self.step, **_losses(score, run.vocab), **score.metrics}
        found["count"] = math.ceil(score.chars)
        if run.vocab.kind == "bytes":
            found["bytes"] = score.count
        if run.vocab.unknown:
            found["unknown"] = int(np.count_nonzero(ids == run.vocab.symbols.index(UNKNOWN)))
        if train_ids is not None:
            adapted = score._replace(nats=dynamic_cross_entropy(self.model, self.params, train_ids, ids, run.config.eval))
            found |= {f"dynamic_{key}": value for key, value in _losses(adapted, run.vocab).items()}
        return found

    def _text_for_dynamic_evaluation(self) -> np.ndarray:
        """Return the training text. Raises ConfigError if dynamic evaluation is not possible for this run."""
        config, train_ids = self.run.config, self.corpus().train
        if config.batching.loss_on == "last":
            raise ConfigError("--dynamic scores all characters, but the run's batching.loss_on is 'last'")
        if len(train_ids) <= (needed := 2 * config.eval.dynamic_segment):
            raise ConfigError(
                f"--dynamic needs more than {needed} symbols of training text, twice eval.dynamic_segment; the text has "
                f"{len(train_ids)}"
            )
        return train_ids


def load_model(run: Run, checkpoint: str = "best") -> TrainedModel:
    """Load a checkpoint of a run: `best`, `latest` or a step.

    Raises:
        WorkdirError: there is no such checkpoint, or it is damaged.
    """
    check_memory(run.config, run.vocab.size, training=False)
    checkpoints = Checkpoints(run.path, lambda: state_shapes(run.config, run.vocab.size))
    flat, meta = checkpoints.find(checkpoint, say)
    model = CharLM.from_config(run.config.model, run.vocab.size)
    return TrainedModel(run, model, eval_params(flat, model), meta["step"])


def _losses(score: Score, vocab: Vocab) -> dict[str, float]:
    """Return a score in every unit."""
    losses = {"nats_per_char": score.nats_per_char, "bits_per_char": score.bits_per_char, "perplexity": score.perplexity}
    if vocab.kind == "bytes":
        losses |= {"nats_per_byte": score.nats_per_symbol, "bits_per_byte": score.nats_per_symbol / math.log(2)}
    return losses
