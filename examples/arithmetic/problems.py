"""Word problems in the GSM8K format, drawn from templates.

A *story* is arithmetic without words: ranges for its numbers and one to three steps over them.
A *language* is words without arithmetic: names, nouns and, for each story, its questions and
worked answer. Another language is another file in ``languages/``.

The split of a question is a hash of the numbers in it, whatever their order. So no test question
shares its set of numbers with any training question: swapping a name, a noun, the story or the
language cannot carry a test question into the training data.

A *style* is how a question is put to the model. ``plain`` is the question in the frame of its
language, such as ``Question: …`` over ``Answer:``. ``mgsm`` is an instruction, a blank line and
the bare question, as MGSM is asked zero-shot; its answer ends in a line such as ``Answer: 7``.
``mgsm_framed`` is the same with the question in its frame.
"""

import argparse
import hashlib
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LIMIT = 200  # every intermediate result lies in [2, LIMIT)
TEST_SHARE = 0.1  # of all sets of numbers
STYLES = ("plain", "mgsm", "mgsm_framed")

Range = tuple[int, int]


@dataclass(frozen=True)
class Story:
    """Inclusive ranges of the numbers, and the steps; ``r1`` names the first step's result."""

    draws: dict[str, Range]
    steps: tuple[str, ...]


@dataclass(frozen=True)
class Wording:
    """A story in one language: interchangeable questions, and one answer line per step."""

    questions: tuple[str, ...]
    answer: tuple[str, ...]


@dataclass(frozen=True)
class Language:
    """``names`` fill {name}, {friend} and {other}; each key of ``nouns`` is a field of its own."""

    frame: str
    instruction: str
    last_line: str
    names: tuple[str, ...]
    nouns: dict[str, tuple[str, ...]]
    stories: dict[str, Wording]


_BIG, _SMALL, _FACTOR = (12, 150), (3, 60), (2, 15)

STORIES: dict[str, Story] = {
    "give": Story({"a": _BIG, "b": _SMALL}, ("a - b",)),
    "collect": Story({"a": _BIG, "b": _SMALL}, ("a + b",)),
    "difference": Story({"a": _BIG, "b": _SMALL}, ("a - b",)),
    "boxes": Story({"a": _FACTOR, "b": _FACTOR}, ("a * b",)),
    "share": Story({"a": _BIG, "b": (2, 12)}, ("a / b",)),
    "half": Story({"a": (10, 198)}, ("a / 2",)),
    "half_as_many": Story({"a": (10, 130)}, ("a / 2", "a + r1")),
    "gain_lose": Story({"a": _BIG, "b": _SMALL, "c": _SMALL}, ("a + b", "r1 - c")),
    "boxes_and_loose": Story({"a": _FACTOR, "b": _FACTOR, "c": _SMALL}, ("a * b", "r1 + c")),
    "boxes_minus": Story({"a": _FACTOR, "b": _FACTOR, "c": _SMALL}, ("a * b", "r1 - c")),
    "more_than": Story({"a": _SMALL, "b": _SMALL}, ("a + b", "a + r1")),
    "twice_as_many": Story({"a": (4, 66)}, ("a * 2", "a + r1")),
    "change": Story({"a": (2, 10), "b": (2, 12), "c": (20, 150)}, ("a * b", "c - r1")),
    "savings": Story({"a": _FACTOR, "b": _FACTOR, "c": (30, 190)}, ("a * b", "c - r1")),
    "bus": Story({"a": (15, 80), "b": (3, 30), "c": (3, 30)}, ("a - b", "r1 + c")),
    "share_rest": Story({"a": _BIG, "b": _SMALL, "c": (2, 12)}, ("a - b", "r1 / c")),
    "ages": Story({"a": (4, 60), "b": (2, 30), "c": (2, 20)}, ("a + b", "r1 + c")),
    "wages": Story({"a": (2, 10), "b": (5, 20), "c": _SMALL}, ("a * b", "r1 + c")),
    "chain": Story({"a": (10, 90), "b": _SMALL}, ("a - b", "r1 * 2", "r1 + r2")),
    "two_prices": Story(
        {"a": (2, 9), "b": (2, 12), "c": (2, 9), "d": (2, 12)}, ("a * b", "c * d", "r1 + r2")
    ),
    "book": Story({"a": (5, 50), "b": (2, 30), "c": (60, 190)}, ("a + b", "a + r1", "c - r2")),
    "market": Story(
        {"a": (12, 60), "b": (2, 20), "c": (2, 20), "d": (2, 6)}, ("a - b", "r1 - c", "r2 * d")
    ),
    "half_then_buy": Story({"a": (10, 190), "b": _SMALL}, ("a / 2", "a - r1", "r2 + b")),
    "pool": Story(
        {"a": _SMALL, "b": _SMALL, "c": _SMALL, "d": (2, 9)}, ("a + b", "r1 + c", "r2 / d")
    ),
}


def load_language(path: Path) -> Language:
    """Read a language file; names and nouns stand in it as "one, two, three"."""
    table = json.loads(path.read_text(encoding="utf-8"))
    return Language(
        frame=table["prompt"],
        instruction=table["mgsm_instruction"],
        last_line=table["mgsm_answer"],
        names=tuple(table["names"].split(", ")),
        nouns={noun: tuple(choices.split(", ")) for noun, choices in table["nouns"].items()},
        stories={
            kind: Wording(tuple(wording["questions"]), tuple(wording["answer"]))
            for kind, wording in table["stories"].items()
        },
    )


LANGUAGES: dict[str, Language] = {
    path.stem: load_language(path)
    for path in sorted((Path(__file__).parent / "languages").glob("*.json"))
}


def split_of(question: str) -> str:
    """``"test"`` or ``"train"``, from the numbers in ``question`` in ascending order."""
    numbers = sorted(map(int, re.findall(r"\d+", question)))
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return "test" if int.from_bytes(digest[:4], "big") < TEST_SHARE * 2**32 else "train"


def work_out(story: Story, numbers: dict[str, int]) -> list[tuple[str, int]] | None:
    """Each step as ``("23 - 5 = 18", 18)``; None where a result is a fraction or out of range."""
    values, worked = dict(numbers), []
    for index, step in enumerate(story.steps, start=1):
        left, operator, right = step.split()
        x, y = (values[word] if word in values else int(word) for word in (left, right))
        if operator == "/" and x % y:
            return None
        result = {"+": x + y, "-": x - y, "*": x * y, "/": x // y}[operator]
        if not 2 <= result < LIMIT:
            return None
        values[f"r{index}"] = result
        worked.append((f"{x} {operator} {y} = {result}", result))
    return worked


def draw(rng: random.Random, kind: str, language: str = "en") -> dict[str, str]:
    """One problem of story ``kind``: ``{"question": ..., "answer": ...}``, of either split."""
    story, words = STORIES[kind], LANGUAGES[language]
    worked = None
    while worked is None:
        numbers = {key: rng.randint(low, high) for key, (low, high) in story.draws.items()}
        worked = work_out(story, numbers)
    fields: dict[str, object] = {**numbers}
    fields["name"], fields["friend"], fields["other"] = rng.sample(words.names, 3)
    fields.update({noun: rng.choice(choices) for noun, choices in words.nouns.items()})
    fields.update({f"step{i}": text for i, (text, _) in enumerate(worked, start=1)})
    wording = words.stories[kind]
    question = rng.choice(wording.questions).format_map(fields)
    lines = [line.format_map(fields) for line in wording.answer]
    return {"question": question, "answer": "\n".join([*lines, f"#### {worked[-1][1]}"])}


def generate(
    split: str, count: int, *, seed: int = 0, language: str = "en"
) -> Iterator[dict[str, str]]:
    """``count`` different problems of ``split``, the same for the same ``seed``."""
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', not {split!r}")
    rng, kinds, seen = random.Random(f"{language}/{split}/{seed}"), list(STORIES), set[str]()
    while len(seen) < count:
        problem = draw(rng, rng.choice(kinds), language)
        question = problem["question"]
        if split_of(question) == split and question not in seen:
            seen.add(question)
            yield problem


def prompt(question: str, language: str = "en", style: str = "plain") -> str:
    """What the model is given; its completion is ``completion(answer)`` and the end token."""
    words = LANGUAGES[language]
    asked = question if style == "mgsm" else words.frame.format(question=question)
    return asked if style == "plain" else f"{words.instruction}\n\n{asked}"


def completion(answer: str, language: str = "en", style: str = "plain") -> str:
    """What the model is to write behind ``prompt`` of the same language and style."""
    text = f"\n{answer}" if style == "mgsm" else f" {answer}"
    if style == "plain":
        return text
    return f"{text}\n{LANGUAGES[language].last_line.format(number=final_number(answer))}"


def final_number(answer: str) -> str:
    """The number behind ``#### `` in a worked answer."""
    return answer.rsplit("#### ", 1)[1]


def main() -> None:
    """Write a split to a file."""
    parser = argparse.ArgumentParser(description="Write word problems to a file.")
    parser.add_argument("--split", choices=("train", "test"), default="test")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--language", choices=sorted(LANGUAGES), default="en")
    parser.add_argument(
        "--out", type=Path, required=True, help="*.tsv: question, tab, number; else JSON lines"
    )
    args = parser.parse_args()
    problems = generate(args.split, args.count, seed=args.seed, language=args.language)
    if args.out.suffix == ".tsv":
        lines = (f"{p['question']}\t{final_number(p['answer'])}\n" for p in problems)
    else:
        lines = (json.dumps(problem, ensure_ascii=False) + "\n" for problem in problems)
    with args.out.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(lines)


if __name__ == "__main__":
    main()
