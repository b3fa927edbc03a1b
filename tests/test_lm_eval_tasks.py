"""The task files for lm-evaluation-harness say what the protocols say; read without the harness."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from breakgraph.evaluation.command import main
from breakgraph.evaluation.protocols import LANGUAGES, PROTOCOLS
from breakgraph.evaluation.tasks import FOLDER, word_problems

ARITHMETIC = Path(__file__).parent.parent / "examples" / "arithmetic"


class Loader(yaml.SafeLoader):
    """Reads ``!function`` as the name behind it."""


Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def read(name: str) -> dict[str, Any]:
    config = yaml.load((FOLDER / name).read_text(), Loader)
    included = config.pop("include", None)
    return (read(included) if included else {}) | config


@pytest.mark.parametrize(("file", "task"), [("gsm8k.yaml", "gsm8k"), ("mgsm_de.yaml", "mgsm")])
def test_a_task_decodes_as_its_protocol(file: str, task: str):
    config, protocol = read(file), PROTOCOLS[task]
    assert config["generation_kwargs"] == {
        "until": list(protocol.stop),
        "max_gen_toks": protocol.max_new_tokens,
        "do_sample": False,
    }
    written = "gsm8k.yaml" if task == "gsm8k" else "_mgsm.yaml"
    assert (FOLDER / written).read_text().startswith(f"# The protocol {protocol.name}")
    for key in ("custom_dataset", "process_results"):
        module, _, name = config[key].rpartition(".")
        assert module == word_problems.__name__ and callable(getattr(word_problems, name))


def test_every_language_is_a_task_and_of_the_group():
    names = {f"breakgraph_mgsm_{language}" for language in LANGUAGES}
    tasks = [read(path.name) for path in FOLDER.glob("mgsm_*.yaml")]
    assert {task["task"] for task in tasks} == names == set(read("mgsm.yaml")["task"])
    assert all(t["task"].endswith(t["dataset_kwargs"]["language"]) for t in tasks)


@pytest.mark.parametrize(
    ("group", "text", "right", "invalid"),
    [
        ("gsm8k", " 1 + 1\n#### 2", 1.0, 0.0),
        ("gsm8k", " 1 + 2\n#### 3", 0.0, 0.0),
        ("gsm8k", " none", 0.0, 1.0),
        ("mgsm_de", "3\nAntwort: 2", 1.0, 0.0),
        ("mgsm_de", "Answer: 2", 0.0, 1.0),
    ],
)
def test_verdicts_are_the_protocols(group: str, text: str, right: float, invalid: float):
    doc = {"group": group, "index": 0, "question": "Q?", "answer": 2.0, "prompt": "Q?"}
    assert word_problems.verdict(doc, [text]) == {"exact_match": right, "invalid": invalid}


def test_the_data_are_found_in_a_folder_of_one_task_or_of_both(tmp_path: Path):
    for name in ("gsm8k/test.jsonl", "mgsm/mgsm_de.tsv"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    find, gsm8k = word_problems._find, tmp_path / "gsm8k" / "test.jsonl"
    for given in (tmp_path, tmp_path / "gsm8k", gsm8k):
        assert find(str(given), "gsm8k", "test.jsonl") == gsm8k
    mgsm = tmp_path / "mgsm" / "mgsm_de.tsv"
    for given in (tmp_path, tmp_path / "mgsm", mgsm):
        assert find(str(given), "mgsm", "mgsm_de.tsv") == mgsm
    for given in (None, str(tmp_path), str(mgsm)):
        with pytest.raises(ValueError, match=r"mgsm_fr\.tsv.*--metadata data_path=PATH"):
            find(given, "mgsm", "mgsm_fr.tsv")


def test_without_the_harness_the_command_says_what_to_install(monkeypatch, capsys):
    for name in list(sys.modules):
        if name.startswith(("lm_eval", "breakgraph.evaluation.lm_eval_model")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["lm-eval", "--tasks", "breakgraph_gsm8k"]) == 2
    assert "pip install 'breakgraph[eval]'" in capsys.readouterr().err
