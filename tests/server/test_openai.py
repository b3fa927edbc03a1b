"""The official client against a real socket: it is understood, and what it reads is right."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from .support import MODEL, Running, openai, questions

PROMPT = questions(1)[0]
GREEDY = {"model": "sums", "temperature": 0, "max_tokens": 128}


@pytest.fixture(scope="module")
def answers() -> dict[str, tuple[list[int], str]]:
    """What transformers makes of 50 problems: token ids, with the end token, and text."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    tokenizer.padding_side = "left"
    prompts = questions(50)
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    with torch.no_grad():
        out = model.generate(**batch, max_new_tokens=128, do_sample=False)
    made = {}
    for prompt, row in zip(prompts, out[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
        ids = row[: row.index(tokenizer.eos_token_id) + 1]
        made[prompt] = (ids, tokenizer.decode(ids, skip_special_tokens=True))
    return made


def test_greedy_text_is_that_of_transformers(server: Running, answers):
    prompts = list(answers)
    for part in (prompts[:16], prompts[16:32], prompts[32:48], prompts[48:]):
        done = server.client().completions.create(prompt=part, **GREEDY)
        assert [choice.text for choice in done.choices] == [answers[p][1] for p in part]
        assert {choice.finish_reason for choice in done.choices} == {"stop"}
        assert done.usage.completion_tokens == sum(len(answers[p][0]) for p in part)


def test_a_stream_is_the_same_text_in_pieces(server: Running, answers):
    stream = server.client().completions.create(
        prompt=PROMPT, stream=True, stream_options={"include_usage": True}, **GREEDY
    )
    *chunks, last = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == answers[PROMPT][1]
    assert len(chunks) > 5
    assert [c.choices[0].finish_reason for c in chunks[-2:]] == [None, "stop"]
    assert last.choices == [] and last.usage.completion_tokens == len(answers[PROMPT][0])


def test_token_ids_in_place_of_text(server: Running, answers):
    tokenizer = AutoTokenizer.from_pretrained(MODEL, local_files_only=True)
    ids = [tokenizer(prompt)["input_ids"] for prompt in questions(2)]
    done = server.client().completions.create(
        prompt=ids, extra_body={"return_token_ids": True}, **GREEDY
    )
    for choice, prompt in zip(done.choices, questions(2), strict=True):
        assert (choice.token_ids, choice.text) == answers[prompt]
    one = server.client().completions.create(prompt=ids[0], **GREEDY)
    assert one.choices[0].text == answers[PROMPT][1]


def test_n_choices_of_each_prompt_in_order(server: Running):
    ask = {"model": "sums", "prompt": ["Tom has", "Ann buys"], "n": 3, "max_tokens": 8}
    done = server.client().completions.create(**ask, seed=7, temperature=2.0, echo=True)
    texts = [choice.text for choice in done.choices]
    assert [choice.index for choice in done.choices] == list(range(6))
    assert all(text.startswith("Tom has") for text in texts[:3])
    assert all(text.startswith("Ann buys") for text in texts[3:])
    assert len(set(texts)) > 2
    again = server.client().completions.create(**ask, seed=7, temperature=2.0, echo=True)
    assert [choice.text for choice in again.choices] == texts
    assert again.usage.prompt_tokens == done.usage.prompt_tokens < 10


def test_logprobs_and_echo_add_up(server: Running):
    ask = {"model": "sums", "prompt": PROMPT, "temperature": 0, "max_tokens": 6}
    done = server.client().completions.create(**ask, logprobs=3, echo=True).choices[0]
    found = done.logprobs
    assert "".join(found.tokens) == done.text and done.text.startswith(PROMPT)
    for token, offset in zip(found.tokens, found.text_offset, strict=True):
        assert done.text[offset : offset + len(token)] == token
    assert found.token_logprobs[0] is None
    assert all(value <= 0 for value in found.token_logprobs[1:])
    for token, value, top in list(
        zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True)
    )[-6:]:
        assert len(top) == 3 and max(top, key=top.get) == token
        assert top[token] == pytest.approx(value)
    # Scored as a prompt, the text has the log-probabilities it was made with.
    scored = server.client().completions.create(
        model="sums", prompt=done.text, max_tokens=0, echo=True, logprobs=0
    )
    assert scored.choices[0].text == done.text
    assert scored.choices[0].logprobs.token_logprobs[1:] == pytest.approx(
        found.token_logprobs[1:], abs=1e-3
    )


def test_streamed_logprobs_are_those_of_the_whole(server: Running):
    ask = {"model": "sums", "prompt": PROMPT, "temperature": 0, "max_tokens": 9, "logprobs": 1}
    whole = server.client().completions.create(**ask, echo=True).choices[0].logprobs
    parts = [
        chunk.choices[0].logprobs
        for chunk in server.client().completions.create(**ask, echo=True, stream=True)
    ]
    assert [token for part in parts for token in part.tokens] == whole.tokens
    assert [offset for part in parts for offset in part.text_offset] == whole.text_offset


def test_chat_streaming_and_not(server: Running, answers):
    question = PROMPT.removesuffix("\nAnswer:")
    chat = {
        "messages": [{"role": "user", "content": [{"type": "text", "text": question}]}],
        "model": "sums",
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 2,
    }
    done = server.client().chat.completions.create(**chat)
    message = done.choices[0].message
    assert (message.role, message.content) == ("assistant", answers[PROMPT][1])
    assert len(done.choices[0].logprobs.content) == len(answers[PROMPT][0])
    entry = done.choices[0].logprobs.content[0]
    assert len(entry.top_logprobs) == 2 and bytes(entry.bytes).decode() == entry.token
    chunks = list(server.client().chat.completions.create(**chat, n=2, stream=True))
    assert all(chunk.object == "chat.completion.chunk" for chunk in chunks)
    for index in (0, 1):
        deltas = [c.choices[0] for c in chunks if c.choices[0].index == index]
        assert deltas[0].delta.role == "assistant"
        assert "".join(d.delta.content for d in deltas) == answers[PROMPT][1]
        assert deltas[-1].finish_reason == "stop"


def test_stop_strings_and_max_tokens(server: Running):
    stopped = server.client().completions.create(prompt=PROMPT, stop=["In both"], **GREEDY)
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.choices[0].text.endswith("pages.\n")
    cut = server.client().completions.create(model="sums", prompt=PROMPT)
    assert cut.choices[0].finish_reason == "length" and cut.usage.completion_tokens == 16
    exact = server.client().chat.completions.create(
        model="sums", messages=[{"role": "user", "content": PROMPT}], max_completion_tokens=3
    )
    assert exact.usage.completion_tokens == 3


def test_models_are_listed(server: Running):
    (model,) = server.client().models.list().data
    assert (model.id, model.max_model_len) == ("sums", 2048)
    assert server.client().models.retrieve("sums").id == "sums"
    with pytest.raises(openai.NotFoundError, match="is not served here"):
        server.client().models.retrieve("other")


@pytest.mark.parametrize(
    ("fields", "said", "param"),
    [
        ({"prompt": []}, "give a text, a list of texts", "prompt"),
        ({"prompt": [[]]}, "give a text, a list of texts", "prompt"),
        ({"prompt": ""}, "is empty", "prompt"),
        ({"prompt": [99999]}, "the vocabulary has ids 0 to 2047", "prompt"),
        ({"prompt": "x " * 3000}, "the model's is 2048", None),
        ({"prompt": "x " * 30000}, "the model's context is 2048 tokens", None),
        ({"temperature": "hot"}, "temperature: Input should be a valid number", "temperature"),
        ({"temperature": -1}, "temperature is -1", None),
        ({"top_p": 0}, "top_p is 0", None),
        ({"max_tokens": 0}, "needs echo", "max_tokens"),
        ({"max_tokens": -4}, "must be at least 1", None),
        ({"max_tokens": 5000}, "the model's context is 2048", "max_tokens"),
        ({"n": 0}, "n: Input should be greater than or equal to 1", "n"),
        ({"n": 17}, "--max-choices", None),
        ({"prompt": ["a"] * 9, "n": 2}, "--max-choices", None),
        ({"stop": [""]}, "a stop string is empty", None),
        ({"logprobs": 1000}, "logprobs is 1000", None),
        ({"logit_bias": {"5": 10}}, "logit_bias is not supported", None),
        ({"best_of": 3}, "best_of is not supported", None),
    ],
)
def test_a_mistake_is_a_400_that_says_what_to_do(server: Running, fields, said, param):
    with pytest.raises(openai.BadRequestError, match=said) as caught:
        server.client().completions.create(
            **{"model": "sums", "prompt": "a", "extra_body": fields}
            | {key: value for key, value in fields.items() if key == "prompt"}
        )
    assert caught.value.body["type"] == "invalid_request_error"
    assert caught.value.body["param"] == param


def test_other_errors_have_the_same_shape(server: Running):
    with pytest.raises(openai.NotFoundError, match="'gpt' is not served here; this is 'sums'"):
        server.client().completions.create(model="gpt", prompt="a")
    with server.http() as http:
        for answer, status in (
            (http.get("/nothing"), 404),
            (http.get("/v1/completions"), 405),
            (http.post("/v1/completions", content=b"{"), 400),
            (http.post("/v1/completions", data={"prompt": "a"}), 400),
            (http.post("/v1/completions", json=[1]), 400),
            (http.post("/v1/embeddings", json={"input": "a"}), 400),
            (http.post("/classify", json={"input": "a"}), 400),
        ):
            assert answer.status_code == status
            error = answer.json()["error"]
            assert set(error) == {"message", "type", "param", "code"} and error["message"]
        unknown = http.post("/v1/completions", json={"prompt": "a", "user": "me", "new": [1]})
        assert unknown.status_code == 200


def test_a_template_decides_what_it_is_given(server: Running):
    def ask(**extra):
        return server.client().chat.completions.create(
            model="sums", messages=[{"role": "user", "content": "a"}], extra_body=extra
        )

    with pytest.raises(openai.BadRequestError, match="chat_template is not for"):
        ask(chat_template_kwargs={"chat_template": "{{ 1 }}"})
    with pytest.raises(openai.BadRequestError, match="'image_url' is not supported"):
        server.client().chat.completions.create(
            model="sums",
            messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
        )


def test_scores_are_probabilities_of_the_labels(server: Running):
    with server.http() as http:
        digits = [http.post("/tokenize", json={"prompt": d}).json()["tokens"][-1] for d in "789"]
        query, items = "Tom has 3 + 4 =", [" ", " x "]
        body = {"query": query, "items": items, "label_token_ids": digits}
        plain = http.post("/v1/score", json=body).json()["scores"]
        shares = http.post("/v1/score", json=body | {"apply_softmax": True}).json()["scores"]
        bad = http.post("/v1/score", json=body | {"items": [[3]]})
    assert len(plain) == 2 and all(0 <= value <= 1 for row in plain for value in row)
    assert plain[0].index(max(plain[0])) == 0
    for row, share in zip(plain, shares, strict=True):
        assert share == pytest.approx([value / sum(row) for value in row], rel=1e-4)
    assert bad.status_code == 400 and "both be texts" in bad.text
    top = server.client().completions.create(
        model="sums", prompt=query + " ", max_tokens=1, temperature=0, logprobs=1
    )
    assert math.exp(top.choices[0].logprobs.token_logprobs[0]) == pytest.approx(plain[0][0], 1e-4)


def test_tokenize_explain_and_info(server: Running):
    with server.http() as http:
        assert http.post("/tokenize", json={"prompt": "Tom"}).json()["count"] >= 1
        said = http.post("/explain", json={"num_tokens": [40]}).json()["explanation"]
        assert "40 tokens replay in bucket 64" in said
        said = http.post("/explain", json={"prompt": [[5] * 20]}).json()["explanation"]
        assert "20 tokens replay in bucket 32" in said
        assert "either" in http.post("/explain", json={}).json()["error"]["message"]
        assert http.post("/explain", json={"num_tokens": [9999]}).status_code == 400
        assert http.get("/health").status_code == 200
        assert http.get("/health_generate").status_code == 200
        info = http.get("/get_server_info").json()
    assert info["graphs"]["buckets"] == [16, 32, 64, 128]
    assert info["last_prefill"]["segments"] == 7 and info["model"]["name"] == "sums"
    json.dumps(info)
