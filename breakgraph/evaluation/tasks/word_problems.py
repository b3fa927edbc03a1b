"""What the task files ask of Python: a protocol's questions as a data set, and its verdicts.

A prompt is made by the protocol alone and reaches the model as it is: the task files add nothing,
so a figure of either harness bears the same protocol's name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from breakgraph.evaluation.answering import Answer
from breakgraph.evaluation.protocols import PROTOCOLS, Item
from breakgraph.evaluation.questions import Question
from breakgraph.evaluation.report import grade

if TYPE_CHECKING:
    from datasets import Dataset

GIVE = "give it as --metadata data_path=PATH"


def gsm8k(
    data_path: str | None = None, num_shots: int | None = None, **others: Any
) -> dict[str, Dataset]:
    """The questions of GSM8K, as the split ``test``.

    Args:
        data_path: the file, or a folder with ``test.jsonl`` or ``gsm8k/test.jsonl``.
        num_shots: worked questions before each; None takes the protocol's.
        **others: of the harness's metadata, and of no interest.

    Raises:
        ValueError: the file is not there or not of its format; the message says what to do.
    """
    shots = PROTOCOLS["gsm8k"].shots if num_shots is None else num_shots
    return _dataset("gsm8k", _find(data_path, "gsm8k", "test.jsonl"), shots)


def mgsm(language: str, data_path: str | None = None, **others: Any) -> dict[str, Dataset]:
    """MGSM's questions in a language, as the split ``test``.

    Args:
        language: two letters.
        data_path: a folder with ``mgsm_XX.tsv``, or with ``mgsm/mgsm_XX.tsv``.
        **others: of the harness's metadata, and of no interest.

    Raises:
        ValueError: the file is not there or not of its format; the message says what to do.
    """
    return _dataset("mgsm", _find(data_path, "mgsm", f"mgsm_{language}.tsv"), 0)


def verdict(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """The protocol's grade of one answer: the metrics ``exact_match`` and ``invalid``."""
    item = Item(
        group=doc["group"],
        index=doc["index"],
        question=Question(doc["question"], doc["answer"]),
        shots="",
        prompt=doc["prompt"],
    )
    answer = Answer(text=results[0], completion_tokens=0, finish_reason=None)
    (graded,) = grade(PROTOCOLS[item.group.partition("_")[0]], [item], [answer])
    return {
        "exact_match": float(graded.verdict == "right"),
        "invalid": float(graded.verdict == "invalid"),
    }


def _find(data_path: str | None, task: str, name: str) -> Path:
    if data_path is None:
        raise ValueError(f"{task} needs the folder that holds {name}; {GIVE}")
    given = Path(data_path)
    # A folder of one task, one that holds both tasks' folders, or the file itself.
    places = [given / name, given / task / name]
    if given.name == name or (task == "gsm8k" and given.is_file()):
        places = [given]
    for place in places:
        if place.is_file():
            return place
    raise ValueError(f"there is no {' and no '.join(map(str, places))}; {GIVE}")


def _dataset(task: str, path: Path, shots: int) -> dict[str, Dataset]:
    from datasets import Dataset

    rows = [
        {
            "group": item.group,
            "index": item.index,
            "question": item.question.question,
            "answer": item.question.answer,
            "prompt": item.prompt,
        }
        for item in PROTOCOLS[task].items([path], None, shots)
    ]
    return {"test": Dataset.from_list(rows)}
