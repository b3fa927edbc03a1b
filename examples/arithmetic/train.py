"""Train a small model on the word problems of ``problems.py`` and save it as a checkpoint.

Two kinds of row make up the data: one problem on its own, and as many problems as fit behind each
other, separated like the shots of a few-shot prompt. A row is in one language, in any styles. The
loss counts answers only. Behind every answer the target is the end token, also where the row goes
on with a next shot, so the model ends its answer however many shots came before.
"""

import argparse
import json
import math
import multiprocessing
import os
import random
import shutil
import time
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from mamba2 import matrix_product_scan
from problems import STYLES, completion, final_number, generate, prompt
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    NemotronHConfig,
    NemotronHForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

END, END_ID = "<|endoftext|>", 0  # the trainer numbers special tokens first
SHOTS_BETWEEN = "\n\n"
SHORT, LONG = 144, 768  # tokens of a row of one problem, and of a row of many
CHUNK = 2000  # problems a worker makes at a time
LANGUAGE_CYCLE = ("en", "es", "de", "en", "fr", "zh")  # of the chunks: English twice
STYLE_SHARES = (0.86, 0.09, 0.05)  # of training problems, in the order of STYLES
BLOCKS = "M-M*-M-M*-M-"  # of NemotronH, in the letters of its checkpoints
BLOCK_TYPES = {"M": "linear_attention", "*": "full_attention", "-": "mlp"}
IGNORE = -100
# Qwen's split into words: single digits, and a word together with the space before it.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def styled(language: str, count: int, seed: int) -> Iterator[tuple[str, dict[str, str]]]:
    """``count`` training problems, each with a style drawn by ``STYLE_SHARES``."""
    styles = random.Random(seed).choices(STYLES, STYLE_SHARES, k=count)
    return zip(styles, generate("train", count, seed=seed, language=language), strict=True)


def build_tokenizer(vocab_size: int, seed: int) -> Tokenizer:
    """Byte-level BPE over a sample of the problems: lossless for any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = (
        prompt(problem["question"], language, style)
        + completion(problem["answer"], language, style)
        for language in LANGUAGE_CYCLE
        for style, problem in styled(language, 5000, seed)
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the two files that ``AutoTokenizer.from_pretrained(folder)`` reads."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": END,
        "model_max_length": 2048,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def copy_tokenizer(source: Path, folder: Path) -> Tokenizer:
    """Take over the tokenizer of the checkpoint in ``source``, file by file."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, folder / name)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    if tokenizer.token_to_id(END) != END_ID:
        raise ValueError(f"{source}: the tokenizer must have {END} as token {END_ID}")
    return tokenizer


def make_rows(tokenizer: Tokenizer, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ``CHUNK`` problems: [n, 2, SHORT] and [m, 2, LONG] of ids and targets, int16.

    A target is the token that follows, at positions that predict an answer.
    """
    between = tokenizer.encode(SHOTS_BETWEEN).ids
    short: list[tuple[list[int], list[int]]] = []
    long: list[tuple[list[int], list[int]]] = [([], [])]
    language = LANGUAGE_CYCLE[seed % len(LANGUAGE_CYCLE)]
    for style, problem in styled(language, CHUNK, seed):
        question = tokenizer.encode(prompt(problem["question"], language, style)).ids
        answer = tokenizer.encode(completion(problem["answer"], language, style)).ids
        ids = question + answer
        targets = [*[IGNORE] * (len(question) - 1), *answer, END_ID]
        if len(ids) <= SHORT:
            short.append((ids, targets))
        row_ids, row_targets = long[-1]
        if row_ids and len(row_ids) + len(between) + len(ids) > LONG:
            long.append(([*ids], [*targets]))
            continue
        if row_ids:
            row_ids += between
            row_targets += [IGNORE] * len(between)
        row_ids += ids
        row_targets += targets

    def stack(rows: list[tuple[list[int], list[int]]], length: int) -> np.ndarray:
        padded = [
            [ids + [END_ID] * (length - len(ids)), targets + [IGNORE] * (length - len(ids))]
            for ids, targets in rows
        ]
        return np.array(padded, dtype=np.int16)

    return stack(short, SHORT), stack(long, LONG)


def make_data(tokenizer: Tokenizer, problems: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of ``problems`` training problems, made by as many workers as there are cores."""
    seeds = range(seed + 1, seed + 1 + math.ceil(problems / CHUNK))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with multiprocessing.get_context("fork").Pool() as pool:
        made = pool.map(partial(make_rows, tokenizer), seeds)
    short, long = (torch.from_numpy(np.concatenate(rows)) for rows in zip(*made, strict=True))
    return short, long


def batches(rows: torch.Tensor, size: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Batches of ``size`` rows without end, each epoch in a new order."""
    if len(rows) < size:
        raise ValueError(f"{len(rows)} rows make no batch of {size}; raise --problems")
    while True:
        order = torch.randperm(len(rows), generator=generator).to(rows.device)
        for start in range(0, len(rows) - size + 1, size):
            yield rows[order[start : start + size]].long()


def build_model(args: argparse.Namespace, device: str) -> Qwen3ForCausalLM | NemotronHForCausalLM:
    """A model of ``--architecture`` with random weights, drawn from ``--seed``."""
    common: dict[str, Any] = {
        "vocab_size": args.vocab_size,
        "hidden_size": args.hidden_size,
        "head_dim": 64,
        "max_position_embeddings": 2048,
        "bos_token_id": None,
        "eos_token_id": END_ID,
        "pad_token_id": END_ID,
    }
    torch.manual_seed(args.seed)
    if args.architecture == "qwen3":
        qwen3 = Qwen3Config(
            intermediate_size=2 * args.hidden_size,
            num_hidden_layers=args.layers,
            num_attention_heads=8,
            num_key_value_heads=4,
            tie_word_embeddings=True,
            **common,
        )
        with torch.device(device):
            return Qwen3ForCausalLM(qwen3)
    nemotron_h = NemotronHConfig(
        layers_block_type=[BLOCK_TYPES[letter] for letter in args.blocks],
        intermediate_size=5 * args.hidden_size // 2,
        num_attention_heads=4,
        num_key_value_heads=2,
        mamba_num_heads=args.hidden_size // 32,
        mamba_head_dim=64,
        ssm_state_size=64,
        n_groups=2,
        chunk_size=64,
        **common,
    )
    with torch.device(device):
        return NemotronHForCausalLM(nemotron_h)


def train(
    model: Qwen3ForCausalLM | NemotronHForCausalLM,
    data: tuple[torch.Tensor, torch.Tensor],
    args: argparse.Namespace,
    seconds: float,
) -> dict[str, Any]:
    """Train by AdamW; the cosine schedule ends at ``--steps`` or after ``seconds``."""
    device = next(model.parameters()).device
    groups: list[dict[str, Any]] = [
        {"params": [w for w in model.parameters() if w.ndim == 2]},
        {"params": [w for w in model.parameters() if w.ndim != 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.1)
    generator = torch.Generator().manual_seed(args.seed)
    sources = [
        batches(rows.to(device), args.batch_tokens // rows.shape[-1], generator) for rows in data
    ]
    start, progress, step = time.perf_counter(), 0.0, 0
    recent: list[torch.Tensor] = []
    while progress < 1:
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (step + 1) / 200) * cosine
        ids, targets = next(sources[step % 2]).unbind(1)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        recent = [*recent[-99:], loss.detach()]
        if step % args.log_every == 0:
            mean, spent = torch.stack(recent).mean().item(), time.perf_counter() - start
            print(f"step {step} loss {mean:.4f} progress {progress:.3f} {spent:.0f} s", flush=True)
        progress = max(step / args.steps, (time.perf_counter() - start) / seconds)
    return {
        "steps": step,
        "final_loss": round(torch.stack(recent).mean().item(), 5),
        "train_seconds": round(time.perf_counter() - start, 1),
    }


@torch.inference_mode()
def complete(folder: Path, prompts: list[str], device: str, batch: int = 500) -> list[str]:
    """Greedy completions in float32, by the saved checkpoint."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.to(device).eval()
    texts: list[str] = []
    for start in range(0, len(prompts), batch):
        inputs = tokenizer(prompts[start : start + batch], padding=True)
        inputs = inputs.convert_to_tensors("pt").to(device)
        output = model.generate(**inputs, max_new_tokens=150, do_sample=False)
        written = output[:, inputs["input_ids"].shape[1] :]
        texts += tokenizer.batch_decode(written, skip_special_tokens=True)
    return texts


def is_right(text: str, answer: str, language: str, style: str) -> bool:
    """Whether ``text`` ends as the worked answer does, behind its calculations."""
    last_lines = completion(f"#### {final_number(answer)}", language, style).strip()
    return text.endswith(f"\n{last_lines}")


def accuracy(folder: Path, each: int, device: str) -> dict[str, dict[str, float]]:
    """Share of right final numbers among ``each`` held-out questions by language and style."""
    asked = [
        (language, style, problem)
        for language in sorted(set(LANGUAGE_CYCLE))
        for style in STYLES
        for problem in generate("test", each, seed=1, language=language)
    ]
    prompts = [prompt(problem["question"], language, style) for language, style, problem in asked]
    shares: dict[str, dict[str, float]] = {}
    for (language, style, problem), text in zip(
        asked, complete(folder, prompts, device), strict=True
    ):
        row = shares.setdefault(language, dict.fromkeys(STYLES, 0.0))
        row[style] += is_right(text, problem["answer"], language, style)
    return {
        language: {style: round(right / each, 4) for style, right in row.items()}
        for language, row in shares.items()
    }


def few_shot_accuracy(
    folder: Path, questions: list[dict[str, str]], shots: int, device: str
) -> float:
    """Share of right final numbers in plain English, behind ``shots`` training problems."""
    examples = generate("train", shots, seed=-1)
    before = "".join(
        f"{prompt(p['question'])}{completion(p['answer'])}{SHOTS_BETWEEN}" for p in examples
    )
    texts = complete(folder, [before + prompt(p["question"]) for p in questions], device)
    right = sum(
        is_right(text, problem["answer"], "en", "plain")
        for problem, text in zip(questions, texts, strict=True)
    )
    return right / len(questions)


def main() -> None:
    """Make the data, train, save, and measure the saved checkpoint on the held-out questions."""
    parser = argparse.ArgumentParser(description="Train a small model on word problems.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--architecture", choices=("qwen3", "nemotron_h"), default="qwen3")
    parser.add_argument(
        "--tokenizer", type=Path, help="folder of a checkpoint, to take its tokenizer"
    )
    parser.add_argument("--problems", type=int, default=1_500_000)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument(
        "--max-seconds", type=float, default=225.0, help="for data and training together"
    )
    parser.add_argument("--batch-tokens", type=int, default=65_536)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6, help="of qwen3")
    parser.add_argument("--blocks", default=BLOCKS, help="of nemotron_h")
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--each", type=int, default=100, help="questions measured per style")
    parser.add_argument("--log-every", type=int, default=200)
    args = parser.parse_args()
    begin = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    args.out.mkdir(parents=True, exist_ok=True)
    if args.tokenizer:
        tokenizer = copy_tokenizer(args.tokenizer, args.out)
        args.vocab_size = tokenizer.get_vocab_size()
    else:
        tokenizer = build_tokenizer(args.vocab_size, args.seed)
        save_tokenizer(tokenizer, args.out)
    data = make_data(tokenizer, args.problems, args.seed)
    print(
        f"{tokenizer.get_vocab_size()} tokens; {[tuple(rows.shape) for rows in data]} rows,"
        f" {time.perf_counter() - begin:.0f} s",
        flush=True,
    )

    model: Any = build_model(args, device)
    with matrix_product_scan() if args.architecture == "nemotron_h" else nullcontext():
        trained = train(model, data, args, args.max_seconds - (time.perf_counter() - begin))
    record: dict[str, Any] = {
        "architecture": args.architecture,
        "seed": args.seed,
        "problems": args.problems,
        "batch_tokens": args.batch_tokens,
        "lr": args.lr,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        **trained,
    }
    model.generation_config.do_sample = False
    model.to(torch.bfloat16).save_pretrained(args.out)

    record["held_out_questions_each"] = args.each
    record["held_out_accuracy"] = accuracy(args.out, args.each, device)
    lines = (Path(__file__).parent / "test.jsonl").read_text(encoding="utf-8").splitlines()
    questions = [json.loads(line) for line in lines]
    record["held_out_english"] = {
        "questions": len(questions),
        **{f"{n}_shot": few_shot_accuracy(args.out, questions, n, device) for n in (0, 3, 5)},
    }
    record["wall_seconds"] = round(time.perf_counter() - begin, 1)
    record["machine"] = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    record["torch"] = torch.__version__
    text = json.dumps(record, indent=2)
    (args.out / "training.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
