"""Score a part of the corpus of a run, or a file, with a model."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from charlm.data.corpus import encode_file
from charlm.data.documents import Documents
from charlm.inference.dynamic import check_dynamic, dynamic_cross_entropy
from charlm.inference.text_score import describe_score, document_scores, losses_in_all_units
from charlm.system.errors import ConfigError

if TYPE_CHECKING:
    from charlm.runs.language_model import LanguageModel


def evaluate(model: "LanguageModel", split: str, file: str | Path | None, dynamic: bool, per_document: bool) -> dict[str, Any]:
    """Return the loss of a model on a text in every unit. See `LanguageModel.evaluate`."""
    config, vocab = model.config, model.vocab
    if per_document and model.boundary is None:
        raise ConfigError("per_document: the text of this run has no documents, because its data.documents is not set")
    if file is not None:
        name, ids = str(file), encode_file(Path(file), vocab, config.data.lowercase, Documents.from_config(config.data))
    else:
        if split not in ("train", "val", "test"):
            raise ConfigError(f"split is {split!r}; it must be train, val or test")
        corpus = model.corpus()
        name, ids = f"{corpus.name} {split}", corpus.split(split)
    train_ids = model.corpus().train if dynamic else None
    if dynamic:
        check_dynamic(config, train_ids)
    score = model.score_ids(name, ids, per_document)
    found = {"text": name, "checkpoint": model.num_steps, **describe_score(score, vocab, ids)}
    if per_document:
        found["documents"] = document_scores(ids, score.nats_N, vocab, model.boundary)
    if train_ids is not None:
        adapted = score._replace(nats=dynamic_cross_entropy(model.module, model.params, train_ids, ids, config.eval))
        found |= {f"dynamic_{key}": value for key, value in losses_in_all_units(adapted, vocab).items()}
    return found
