"""From a row as a user has it to a sample as the tasks read it: which column is what, labels, tags and answers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ..corpus.fields import label_text, lookup
from ..errors import SampleError, UserError
from ..pack.samples import ID_FIELD, TEXT_COLUMNS
from .sources import Source

LABELS = (
    *("label", "labels", "class", "category", "target", "sentiment", "tag", "tags", "classes", "categories", "genre"),
    *("topic", "intent", "emotion", "gold_label", "class_name", "label_text", "coarse_label", "fine_label", "y"),
)
SCORES = ("score", "scores", "rating", "similarity", "stars", "target", "value", "label", "price", "y")
TEXTS = (
    *("text", "sentence", "txt", "content", "review", "comment", "message", "tweet", "utterance", "body", "document"),
    *("question", "query", "description", "title", "headline", "caption", "captions"),
)
PAIRS = (
    *(("text_a", "text_b"), ("sentence1", "sentence2"), ("premise", "hypothesis"), ("text1", "text2")),
    *(("sentence_a", "sentence_b"), ("question1", "question2"), ("question", "sentence"), ("query", "passage")),
    *(("query", "document"), ("claim", "evidence"), ("sent1", "sent2"), ("source", "target")),
)
WORDS, TAGS = ("words", "tokens"), ("tags", "ner_tags", "labels", "pos_tags", "upos", "label")
QUESTIONS, CONTEXTS = ("question", "query"), ("context", "passage", "paragraph", "document")
ANSWERS = ("answers", "answer")


@dataclass
class Columns:
    """Which column holds what; empty where none does."""

    label: str = ""
    texts: list[str] = field(default_factory=list)  # one, or the two of a pair
    words: str = ""
    tags: str = ""
    question: str = ""
    context: str = ""
    answer: str = ""
    notes: list[str] = field(default_factory=list)


def choose_columns(task: str, source: Source, named: dict[str, str]) -> Columns:
    """The columns of a source for a task. named: those that the user named, by role: label, text, pair.

    Raises UserError where a named column is missing, or one that the task needs cannot be told.
    """
    rows = source.probe()
    if not rows:
        place, error = next(source.rows(), ("", ""))
        raise UserError(f"{source.given}: holds no samples{f'; {place}: {error}' * bool(place)}")
    fields = list(dict.fromkeys(name for row in rows for name in row))
    lower = {name.strip().lower(): name for name in reversed(fields)}
    shown = ", ".join(map(str, fields[:20])) or "none"
    columns = Columns()

    def find(role: str, usual: Iterable[str], taken: Iterable[str] = ()) -> str:
        if name := named.get(role, ""):
            if name not in fields and not any(lookup(row, name) is not None for row in rows):
                flag = "--label" if role == "label" else f"--{role}-column"
                raise UserError(f"{source.given}: no column or field {name!r} ({flag}); there are: {shown}")
            return name
        return next((lower[name] for name in usual if name in lower and lower[name] not in taken), "")

    def need(role: str, name: str, what: str) -> str:
        if not name:
            raise UserError(f"{source.given}: no {what}; there are: {shown}")
        return name

    if task == "token-tagging":
        columns.words = need("text", find("text", (*WORDS, "text", "sentence")), "column of words (words or tokens)")
        columns.tags = need("label", find("label", TAGS, [columns.words]), "column of tags (tags, ner_tags, ...)")
        return columns
    if task == "question-answering":
        columns.answer = need("label", find("label", ANSWERS), "column of answers (answers or answer); name it --label")
        if "context" in lower or "question" in lower or not _is_canonical(rows):
            columns.question = need("text", find("text", QUESTIONS), "column of questions (question)")
            columns.context = need("pair", find("pair", CONTEXTS), "column with the context of the questions (context)")
        else:
            columns.texts = ["text"]
        return columns
    text, pair = named.get("text", ""), named.get("pair", "")
    if pair:
        columns.texts = [find("text", TEXTS, [pair]), find("pair", ())]
    elif task in ("pair-classification", "regression") and not text:
        columns.texts = next(([lower[a], lower[b]] for a, b in PAIRS if a in lower and b in lower), [])
        if task == "regression" and columns.texts and columns.texts[1].lower() == "target":
            columns.texts = []
    if task not in ("captioning", "retrieval"):
        usual = SCORES if task == "regression" else LABELS
        columns.label = find("label", usual, columns.texts) or (".cls" if ".cls" in fields else "")
    if not columns.texts:
        name = find("text", TEXTS, [columns.label])
        if not name and not source.shards:
            name = _longest_text(rows, [columns.label, *source.media.values()])
            columns.notes += [f"{source.given}: the text is column {name!r}"] * bool(name)
        columns.texts = [name] if name else []
    if not columns.label and task not in ("captioning", "retrieval"):
        used = {*columns.texts, *source.media.values(), "key"}
        rest = [name for name in fields if name not in used and not ID_FIELD.fullmatch(str(name))]
        if len(rest) != 1:
            raise UserError(
                f"{source.given}: no labels found: no column or field of a usual name (label, class, ...), no .cls"
                f"{', no class folders' * (not source.file)}; name it with --label; there are: {shown}"
            )
        columns.label = rest[0]
    if columns.label and columns.label.lower() != "label":
        columns.notes.append(f"{source.given}: the label is {columns.label!r}")
    return columns


def _longest_text(rows: list[dict], taken: list[str]) -> str:
    """The column whose texts are the longest on average, where that is more than one word; empty where none is."""
    lengths = Counter()
    for row in rows:
        for name, value in row.items():
            if name not in taken and isinstance(value, str) and len(value.split()) > 1:
                lengths[name] += len(value)
    return lengths.most_common(1)[0][0] if lengths else ""


def _is_canonical(rows: list[dict]) -> bool:
    return bool(rows) and all("text" in row and "answer" in row for row in rows)


# ----------------------------------------------------------------------------------------------------- one sample


@dataclass
class Read:
    """What a row says: its text (None where it has none), its label, and the JSON to write beside the text.

    Samples with an equal text in `strong` must stay in one part; in `weak`, where that leaves something to split.
    """

    text: str | None
    label: Any
    row: dict
    strong: list[str] = field(default_factory=list)
    weak: list[str] = field(default_factory=list)


def read_row(task: str, row: dict, columns: Columns, source: Source, label_field: str) -> Read:
    """Read a row. `label_field` is the field that the label is written to; empty leaves all fields as they are.

    Raises SampleError where the sample cannot be used: no label, tags of another length than the words, ...
    """
    if task == "token-tagging":
        return _read_tags(row, columns, source)
    if task == "question-answering":
        return _read_answer(row, columns)
    texts = [_text(row.get(name)) for name in columns.texts]
    if any(texts) and not all(texts):
        raise SampleError("empty", f"no text in {columns.texts[texts.index('')]!r}")
    text = "\n".join(texts) or None
    label = _label(row, columns.label, source.names) if columns.label else None
    if task == "regression":
        label = _number(label, columns.label)
    written = row
    if label_field:
        dropped = {
            *columns.texts,
            columns.label,
            ".cls",
            *["key"] * (not source.file),
            *TEXT_COLUMNS,
            *source.media.values(),
        }
        written = {name: value for name, value in row.items() if name not in dropped and value not in (None, "")}
        written |= {} if columns.label == "" else {label_field: label}
    return Read(text, label, written, [text] if text else [], texts if len(texts) > 1 else [])


def _text(value) -> str:
    """A value as text: the first of a list or map of texts. Raises SampleError where it is no UTF-8."""
    value = next(iter(value.values()), "") if isinstance(value, dict) else value
    value = next(iter(value), "") if isinstance(value, list) else value
    text = "" if value is None or (isinstance(value, float) and math.isnan(value)) else str(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise SampleError("text-decode", "the text is not UTF-8; save the file as UTF-8") from None
    return text.strip()


def _label(row: dict, name: str, names: dict[str, list[str]]) -> str | list[str]:
    """The label as text, or as texts where it is a list. Raises SampleError where there is none."""
    value = row[name] if name in row else lookup(row, name)
    if isinstance(value, (list, tuple)):
        return [_text(label_text(one, names.get(name))) for one in value if one not in (None, "")]
    if value is None or (text := _text(label_text(value, names.get(name)))) == "":
        raise SampleError("label", f"nothing in {name!r}")
    return text


def _number(value, name: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise SampleError("label", f"{value!r} in {name!r} is no number") from None
    if not math.isfinite(number):
        raise SampleError("label", f"{value!r} in {name!r} is no finite number")
    return number


def _read_tags(row: dict, columns: Columns, source: Source) -> Read:
    words, tags = (row.get(name) for name in (columns.words, columns.tags))
    words, tags = (one.split() if isinstance(one, str) else one for one in (words, tags))
    if not isinstance(words, list) or not words or not isinstance(tags, list):
        raise SampleError("label", f"no list of words in {columns.words!r}, or none of tags in {columns.tags!r}")
    if len(words) != len(tags):
        raise SampleError("label", f"{len(words)} words, but {len(tags)} tags")
    words = [_text(word) for word in words]
    if not all(words):
        raise SampleError("empty", f"word {words.index('') + 1} is empty")
    tags = [_text(label_text(tag, source.names.get(columns.tags))) for tag in tags]
    if not all(tags):
        raise SampleError("label", f"no tag for word {tags.index('') + 1}")
    text = " ".join(words)
    rest = _rest(row, columns.words, columns.tags)
    return Read(text, tags, {**rest, "words": words, "tags": tags}, [text])


def _rest(row: dict, *used: str) -> dict:
    """The other fields, but for those that a tokenizer would read as text."""
    dropped = {*used, *TEXT_COLUMNS, ".cls"}
    return {name: value for name, value in row.items() if name not in dropped and value is not None}


def _read_answer(row: dict, columns: Columns) -> Read:
    if columns.texts:  # written before: question, line end, context
        text, answer = str(row.get("text", "")), row.get("answer")
        if answer is not None:
            start, end = (answer.get("start"), answer.get("end")) if isinstance(answer, dict) else (None, None)
            if not isinstance(start, int) or not isinstance(end, int) or not 0 <= start < end <= len(text):
                raise SampleError("label", f"the answer {answer!r} does not lie in the {len(text)} characters of text")
        return Read(text, answer, {k: v for k, v in row.items() if k != "text"}, [text.partition("\n")[2]])
    question, context = _text(row.get(columns.question)), row.get(columns.context)
    if not question or not isinstance(context, str) or not context.strip():
        raise SampleError("empty", "no question, or no context")
    _text(context)
    found = _answers(row, columns.answer)
    spans = []
    for answer, start in found:
        if start is None:
            start = context.find(answer)
            if start < 0:
                raise SampleError("label", f"the answer {answer[:60]!r} is not in its context")
        elif context[start : start + len(answer)] != answer or start < 0:
            there = context[max(start, 0) : max(start, 0) + len(answer)]
            raise SampleError(
                "label", f"the answer {answer[:60]!r} is not at {start} of its context, but {there[:60]!r}"
            )
        spans.append((start + len(question) + 1, start + len(question) + 1 + len(answer)))
    rest = _rest(row, columns.question, columns.context, columns.answer, "answer", "answers", "answer_start")
    if found:
        rest["answers"] = list(dict.fromkeys(answer for answer, _ in found))
    answer = {"start": spans[0][0], "end": spans[0][1]} if spans else None
    return Read(f"{question}\n{context}", answer, {**rest, "answer": answer}, [context])


def _answers(row: dict, name: str) -> list[tuple[str, int | None]]:
    """The answers with where they begin, if that is said; none where there is no answer."""
    value = row.get(name)
    if isinstance(value, dict):
        texts, starts = value.get("text", value.get("texts")), value.get("answer_start", value.get("start"))
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        texts = [one.get("text") for one in value]
        starts = [one.get("answer_start", one.get("start")) for one in value]
    else:
        texts, starts = value, row.get("answer_start")
    texts = [texts] if isinstance(texts, str) else texts or []
    starts = list(starts) if isinstance(starts, (list, tuple)) else [starts] * len(texts)
    starts = [int(str(start)) if str(start).strip().lstrip("-").isdigit() else None for start in starts]
    if not isinstance(texts, (list, tuple)) or len(texts) != len(starts) or not all(isinstance(t, str) for t in texts):
        raise SampleError("label", f"{name!r} is neither a text nor texts with where each begins")
    return [(text, start) for text, start in zip(texts, starts) if text]
