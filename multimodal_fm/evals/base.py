"""What a file of this folder offers: `Evaluator`, one measurement of a model on an embedded corpus."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from .embed_corpus import EmbeddedCorpus


@dataclass
class Evaluation:
    """What `mmfm evaluate` and the report measure: an entry of `evaluate` in a config, or the command's own flags."""

    on: str | list[str]  # shards: paths, patterns or URLs
    where: dict[str, str] = field(default_factory=dict)  # keep the samples whose JSON has these values
    group: str = ""  # the field whose equal values belong together; empty: an equal text
    within: str = ""  # the field that a query and its gallery share; empty: the gallery is the whole corpus
    labels: str = ""  # the field with the classes; empty: the `.cls` member
    modalities: list[str] = field(default_factory=list)  # empty: all that the corpus has
    evaluators: list[str] = field(default_factory=list)  # import paths of evaluators beside those of this folder
    measure: list[str] = field(default_factory=list)  # evaluators of this folder by name; empty: those of every day
    train: str | list[str] = ""  # shards that kNN and the probe are fitted on; empty: within `on`, by folds
    subgroups: list[str] = field(
        default_factory=list
    )  # fields: the scores of each of their values, and how they differ
    corruptions: list[str] = field(default_factory=list)  # that `robustness` applies; empty: all
    strengths: list[int] = field(default_factory=list)  # of these, from 1 to 5; empty: all five
    trained_on: list[str] = field(default_factory=list)  # shards that `leakage` compares, beside the run's own sources
    class_names: list[str] = field(
        default_factory=list
    )  # of zero-shot and few-shot classification; empty: from the field `label`
    shots: list[int] = field(default_factory=list)  # of `few_shot`: examples in a context; empty: 0, 1, 2, 4, 8, 16
    templates: dict[str, list[str]] = field(default_factory=dict)
    """Sentences for zero-shot classification by modality, with {} for a class's name, as in `image: ["a photo of {}"]`;
    without them, some that fit pictures and sounds. `text`: what stands before a label in few-shot classification, with
    {} for the text."""


@runtime_checkable
class Evaluator(Protocol):
    """Measures a model on an embedded corpus.

    A file of this folder, or a module elsewhere that an evaluation names under `evaluators`, defines a class of this
    name that inherits from this one. Its `Config` is a dataclass whose fields all have defaults; those that are named
    as fields of `Evaluation` are set from it.
    """

    Config: Any
    default: bool = True  # measured where an evaluation does not name what to `measure`
    needs_vectors: bool = False  # compares unit vectors, so that it has nothing to say of a model without such a head
    after_others: bool = False  # looks at `EmbeddedCorpus.scores`, what the others found for each input

    def run(self, embedded: EmbeddedCorpus, config, model, objectives: dict[str, Any]) -> dict[str, dict]:
        """Figures (see `metrics.estimate`) by name, `WHAT/OF/MEASURE`; empty where the corpus does not allow it.

        `config` is an instance of `Config`; `objectives` are the trained objectives by the name of their task.
        """
        raise NotImplementedError
