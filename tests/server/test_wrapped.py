"""Models that run through their transformers class are served as those with files of their own."""

from pathlib import Path

import pytest
import torch
from models_support import make_reference, save_checkpoint
from transformers import AutoTokenizer

from .support import MODEL, Running, questions, running

TEXTS = [question.replace("Question: ", "")[:60] for question in questions(3)]


def test_completions_are_those_of_the_native_model(server: Running):
    ask = {"prompt": questions(6), "temperature": 0, "max_tokens": 96}
    expected = server.client().completions.create(model="sums", **ask).choices
    with running(model_impl="transformers", served_model_name="sums") as wrapped:
        found = wrapped.client().completions.create(model="sums", **ask).choices
        assert wrapped.metric("breakgraph_prefill_forwards_total") > 0
        assert {str(reason) for reason in wrapped.engine.runner.dispatch_counts} == {"replayed"}
    assert [choice.text for choice in found] == [choice.text for choice in expected]


def test_an_encoder_ranks_as_its_class_does(tmp_path: Path):
    model = make_reference("XLMRobertaForSequenceClassification", vocab_size=2048, num_labels=1)
    folder = save_checkpoint(model, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(MODEL, local_files_only=True)
    flags = {"tokenizer_path": str(MODEL), "piecewise_cuda_graph_tokens": (128,)}
    with running(model_path=str(folder), **flags) as server, server.http() as http:
        ranks = http.post("/v1/rerank", json={"query": TEXTS[0], "documents": TEXTS}).json()
    assert len(ranks["results"]) == 3
    for result in ranks["results"]:
        ids = tokenizer(TEXTS[0], TEXTS[result["index"]], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            own = model(ids).logits.sigmoid().item()
        assert result["relevance_score"] == pytest.approx(own, abs=1e-4)
