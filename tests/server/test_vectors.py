"""Embeddings, ranks and classes over HTTP are those of the engine."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from models_support import make_reference, save_checkpoint
from transformers import AutoTokenizer

from .support import MODEL, Running, questions, running

TEXTS = [question.replace("Question: ", "")[:60] for question in questions(4)]
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12]]


@pytest.fixture(scope="module")
def embedder() -> Iterator[Running]:
    with running(is_embedding=True) as server:
        yield server


def test_embeddings_by_the_official_client(embedder: Running):
    client = embedder.client()
    model = str(embedder.engine.args.model_path)
    as_base64 = client.embeddings.create(model=model, input=TEXTS)
    as_floats = client.embeddings.create(model=model, input=TEXTS, encoding_format="float")
    assert [one.index for one in as_base64.data] == [0, 1, 2, 3]
    for one, other in zip(as_base64.data, as_floats.data, strict=True):
        assert one.embedding == pytest.approx(other.embedding, abs=1e-6)
        assert math.hypot(*one.embedding) == pytest.approx(1, abs=1e-4)
    alone = client.embeddings.create(model=model, input=TEXTS[2]).data[0].embedding
    assert alone == pytest.approx(as_floats.data[2].embedding, abs=1e-3)
    assert as_floats.usage.prompt_tokens > 40
    embedder.wait_until_empty()


def test_documents_are_ranked_by_their_vectors(embedder: Running):
    with embedder.http() as http:
        body = {"query": TEXTS[1], "documents": TEXTS, "top_n": 2}
        answer = http.post("/v1/rerank", json=body).json()
        assert http.get("/health_generate").status_code == 200
        refused = http.post("/v1/completions", json={"prompt": "a"})
    assert [len(answer["results"]), answer["results"][0]["index"]] == [2, 1]
    assert answer["results"][0]["relevance_score"] == pytest.approx(1, abs=1e-4)
    assert answer["results"][0]["document"]["text"] == TEXTS[1]
    assert refused.status_code == 400 and "--is-embedding" in refused.text


def test_classes_and_ranks_are_those_of_transformers(tmp_path: Path):
    model = make_reference(
        "Qwen3ForSequenceClassification", vocab_size=2048, id2label={0: "no", 1: "yes"}
    )
    folder = save_checkpoint(model, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(MODEL, local_files_only=True)

    def shares(*texts: str) -> list[float]:
        with torch.no_grad():
            ids = tokenizer(*texts, return_tensors="pt")["input_ids"]
            return model(ids).logits.softmax(-1)[0].tolist()

    flags = {"tokenizer_path": str(MODEL), "piecewise_cuda_graph_tokens": (32, 64)}
    with running(model_path=str(folder), **flags) as server, server.http() as http:
        classes = http.post("/classify", json={"input": TEXTS}).json()
        ranks = http.post("/v1/rerank", json={"query": TEXTS[0], "documents": TEXTS}).json()
        assert http.get("/health_generate").status_code == 200
        refused = http.post("/v1/completions", json={"prompt": "a"})
        assert refused.status_code == 400 and "language-model head" in refused.text
    for text, found in zip(TEXTS, classes["data"], strict=True):
        expected = shares(text)
        assert found["probs"] == pytest.approx(expected, abs=1e-4)
        assert found["label"] == ["no", "yes"][expected.index(max(expected))]
    found = [result["relevance_score"] for result in ranks["results"]]
    assert found == sorted(found, reverse=True)
    for result in ranks["results"]:
        expected = shares(TEXTS[0], TEXTS[result["index"]])[1]
        assert result["relevance_score"] == pytest.approx(expected, abs=1e-4)


def test_token_ids_are_served_without_a_tokenizer():
    with running(skip_tokenizer_init=True, enable_breakable_cuda_graph=False) as server:
        ask = {"max_tokens": 3, "temperature": 0}
        with server.http() as http:
            done = http.post("/v1/completions", json=ask | {"prompt": PROMPTS}).json()
            assert [len(choice["token_ids"]) for choice in done["choices"]] == [3, 3]
            assert {choice["text"] for choice in done["choices"]} == {""}
            for path, body in (
                ("/v1/completions", ask | {"prompt": "a"}),
                ("/v1/completions", ask | {"prompt": [5], "stop": "a"}),
                ("/tokenize", {"prompt": "a"}),
                ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
            ):
                refused = http.post(path, json=body)
                assert refused.status_code == 400 and "tokenizer" in refused.text


def test_a_chat_without_a_template_is_a_400():
    with running(enable_breakable_cuda_graph=False) as plain, plain.http() as http:
        body = {"messages": [{"role": "user", "content": "a"}]}
        refused = http.post("/v1/chat/completions", json=body)
    assert refused.status_code == 400 and "--chat-template" in refused.text
