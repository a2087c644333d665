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


@runtime_checkable
class Evaluator(Protocol):
    """Measures a model on an embedded corpus.

    A file of this folder, or a module elsewhere that an evaluation names under `evaluators`, defines a class of this
    name that inherits from this one. Its `Config` is a dataclass whose fields all have defaults; those that are named
    as fields of `Evaluation` are set from it.
    """

    Config: Any

    def run(self, embedded: EmbeddedCorpus, config, model, objectives: dict[str, Any]) -> dict[str, dict]:
        """Figures (see `metrics.estimate`) by name, `WHAT/OF/MEASURE`; empty where the corpus does not allow it.

        `config` is an instance of `Config`; `objectives` are the trained objectives by the name of their task.
        """
        raise NotImplementedError
