"""The flags are frozen, each mistake names its flag, and every way in gives the same arguments."""

import argparse
import logging
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from breakgraph.runner.buckets import derive_buckets
from breakgraph.server_args import FlagParser, ServerArgs, flag_name, prepare_server_args

# The public surface: flag, default, choices. Change it on purpose only.
SURFACE = [
    ("--model-path", "required", None),
    ("--tokenizer-path", None, None),
    ("--skip-tokenizer-init", False, None),
    ("--load-format", "auto", ("auto", "dummy")),
    ("--model-impl", "auto", ("auto", "native", "transformers")),
    ("--trust-remote-code", False, None),
    ("--enable-torch-compile", False, None),
    ("--device", "auto", ("auto", "cuda", "cpu")),
    ("--dtype", "auto", ("auto", "float32", "bfloat16", "float16")),
    ("--attention-backend", "auto", ("auto", "torch_flash", "flashinfer", "torch_native")),
    ("--enable-breakable-cuda-graph", False, None),
    ("--cuda-graph-backend-prefill", None, ("breakable", "full", "auto", "disabled")),
    ("--prefill-graph-requests", 8, None),
    ("--cuda-graph-memory-budget", None, None),
    ("--cuda-graph-backend-decode", None, ("full", "breakable", "disabled")),
    ("--disable-cuda-graph", False, None),
    ("--cuda-graph-bs", None, None),
    ("--cuda-graph-failure", "auto", ("auto", "error", "eager")),
    ("--debug-cuda-graph", False, None),
    ("--linear-attention-capture", 0, None),
    ("--piecewise-cuda-graph-tokens", None, None),
    ("--max-prefill-padding", 2.0, None),
    ("--prefill-dispatch", "auto", ("auto", "measured", "always")),
    ("--verify-prefill-graph", 0.0, None),
    ("--tp-size", 1, None),
    ("--dp-size", 1, None),
    ("--moe-scatter", False, None),
    ("--matrix-products", "auto", ("auto", "cublas")),
    ("--chunked-prefill-size", None, None),
    ("--max-total-tokens", None, None),
    ("--max-mamba-cache-size", None, None),
    ("--mem-fraction-static", 0.8, None),
    ("--max-running-requests", 64, None),
    ("--max-queued-requests", 1024, None),
    ("--page-size", 1, None),
    ("--disable-radix-cache", False, None),
    ("--is-embedding", False, None),
    ("--pooling", "auto", ("auto", "last", "mean", "cls")),
    ("--random-seed", 0, None),
    ("--log-level", "info", ("debug", "info", "warning", "error")),
    ("--host", "127.0.0.1", None),
    ("--port", 30000, None),
    ("--api-key", None, None),
    ("--served-model-name", None, None),
    ("--chat-template", None, None),
    ("--max-body-bytes", 4 << 20, None),
    ("--max-choices", 128, None),
    ("--request-seconds", 600.0, None),
    ("--drain-seconds", 30.0, None),
    ("--config", None, None),
]


def parse(line: str) -> ServerArgs:
    return prepare_server_args(["--model-path", "m", *line.split()])


def test_flag_surface_is_frozen() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    ServerArgs.add_cli_args(parser)
    defaults = {flag_name(f.name): f.default for f in fields(ServerArgs) if f.name != "model_path"}
    defaults |= {"--model-path": "required", "--config": None}
    found = [
        (a.option_strings[0], defaults[a.option_strings[0]], a.choices and tuple(a.choices))
        for a in parser._actions
    ]
    assert found == SURFACE


def test_defaults() -> None:
    assert parse("") == ServerArgs(model_path="m")
    with pytest.raises(FrozenInstanceError):
        parse("").page_size = 2  # type: ignore[misc]


arguments = st.fixed_dictionaries(
    {"model_path": st.text("abc/", min_size=1)},
    optional={
        "device": st.sampled_from(["auto", "cuda", "cpu"]),
        "load_format": st.sampled_from(["auto", "dummy"]),
        "enable_breakable_cuda_graph": st.booleans(),
        "piecewise_cuda_graph_tokens": st.sets(st.integers(1, 512), min_size=1).map(
            lambda buckets: tuple(sorted(buckets))
        ),
        "chunked_prefill_size": st.integers(512, 9000),
        "max_prefill_padding": st.floats(1, 8),
        "mem_fraction_static": st.floats(0.01, 0.99),
        "max_running_requests": st.integers(1, 512),
        "skip_tokenizer_init": st.booleans(),
    },
)


@given(arguments)
def test_command_line_file_and_keywords_agree(tmp_path_factory, values: dict) -> None:
    expected = ServerArgs(**values)
    argv, lines = [], []
    for name, value in values.items():
        flag = flag_name(name)
        if isinstance(value, bool):
            argv.append(flag if value else flag.replace("--", "--no-"))
            lines.append(f"{flag}: {str(value).lower()}")
        elif isinstance(value, tuple):
            argv += [flag, *map(str, value)]
            lines.append(f"{flag}: {list(value)}")
        else:
            argv += [flag, str(value)]
            lines.append(f"{flag}: {value!r}")
    assert prepare_server_args(argv) == expected
    config = tmp_path_factory.getbasetemp() / "args.yaml"
    config.write_text("\n".join(lines))
    assert prepare_server_args(["--config", str(config)]) == expected


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"model_path": ""}, "--model-path is empty"),
        ({"model_path": 3}, "--model-path must be a path"),
        ({"device": "tpu"}, "--device must be one of auto, cuda, cpu"),
        ({"dtype": ["auto"]}, "--dtype must be one of"),
        ({"page_size": 0}, "--page-size must be at least 1, not 0"),
        ({"page_size": None}, "--page-size must be a whole number"),
        ({"page_size": True}, "--page-size must be a whole number"),
        ({"random_seed": -1}, "--random-seed must be at least 0"),
        ({"max_running_requests": 2.5}, "--max-running-requests must be a whole number"),
        ({"chunked_prefill_size": -1}, "--chunked-prefill-size must be at least 1"),
        ({"max_total_tokens": "many"}, "--max-total-tokens must be a whole number"),
        ({"enable_breakable_cuda_graph": 1}, "--enable-breakable-cuda-graph must be true or false"),
        ({"max_prefill_padding": 0.5}, "--max-prefill-padding must be at least 1"),
        ({"max_prefill_padding": float("nan")}, "--max-prefill-padding"),
        ({"verify_prefill_graph": 1.5}, "--verify-prefill-graph is a share between 0, none, and 1"),
        ({"verify_prefill_graph": float("nan")}, "--verify-prefill-graph is a share"),
        ({"mem_fraction_static": 1}, "--mem-fraction-static is a share between 0 and 1"),
        ({"mem_fraction_static": "0.8"}, "--mem-fraction-static must be a number"),
        ({"piecewise_cuda_graph_tokens": 64}, "--piecewise-cuda-graph-tokens must be a list"),
        ({"piecewise_cuda_graph_tokens": []}, "--piecewise-cuda-graph-tokens is an empty list"),
        ({"piecewise_cuda_graph_tokens": [16, 0]}, "--piecewise-cuda-graph-tokens: 0 is no bucket"),
        (
            {"piecewise_cuda_graph_tokens": [16, 64], "chunked_prefill_size": 32},
            "bucket 64 exceeds the largest forward of 32 tokens",
        ),
        ({"chunked_prefill_size": 64, "max_total_tokens": 32}, "lower the first or raise"),
        ({"linear_attention_capture": -1}, "--linear-attention-capture must be at least 0, not -1"),
        ({"linear_attention_capture": None}, "--linear-attention-capture must be a whole number"),
        ({"max_mamba_cache_size": 0}, "--max-mamba-cache-size must be at least 1, not 0"),
        (
            {"max_mamba_cache_size": 63},
            "--max-mamba-cache-size 63 is less than --max-running-requests 64, each of which has a "
            "state; raise the first or lower the second",
        ),
        ({"device": "cpu", "attention_backend": "torch_flash"}, "use torch_native"),
        ({"dtype": "float32", "attention_backend": "torch_flash"}, "use --dtype bfloat16"),
        ({"device": "cpu", "attention_backend": "flashinfer"}, "use torch_native"),
        ({"dtype": "float32", "attention_backend": "flashinfer"}, "use --dtype bfloat16"),
        ({"pooling": "mean"}, "--is-embedding"),
        (
            {"enable_breakable_cuda_graph": True, "cuda_graph_backend_prefill": "disabled"},
            "--enable-breakable-cuda-graph and --cuda-graph-backend-prefill disabled contradict",
        ),
        (
            {"enable_breakable_cuda_graph": True, "cuda_graph_backend_prefill": "full"},
            "--enable-breakable-cuda-graph and --cuda-graph-backend-prefill full contradict",
        ),
        ({"cuda_graph_memory_budget": 0}, "--cuda-graph-memory-budget must be more than 0"),
        ({"prefill_graph_requests": 0}, "--prefill-graph-requests must be at least 1"),
        (
            {"cuda_graph_backend_prefill": "auto", "tp_size": 2, "dp_size": 2},
            "--cuda-graph-backend-prefill auto decides by each batch's requests",
        ),
        (
            {"disable_cuda_graph": True, "cuda_graph_backend_decode": "full"},
            "--disable-cuda-graph and --cuda-graph-backend-decode full contradict",
        ),
        (
            {"disable_cuda_graph": True, "cuda_graph_bs": [1]},
            "--cuda-graph-bs and --disable-cuda-graph contradict",
        ),
        ({"cuda_graph_bs": [4, 0]}, "--cuda-graph-bs: 0 is no bucket; each is a request count"),
        (
            {"cuda_graph_bs": [128]},
            "exceeds the largest forward of 64 requests, so nothing would ever use it; remove it "
            "or raise --max-running-requests",
        ),
    ],
)
def test_bad_value_names_flag_and_fix(values: dict, said: str) -> None:
    with pytest.raises(ValueError) as error:
        ServerArgs(**{"model_path": "m"} | values)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--page-sise 2", "unknown flag --page-sise; did you mean --page-size?"),
        ("--page-sise=2", "unknown flag --page-sise; did you mean --page-size?"),
        ("--xyzzy", "unknown flag --xyzzy\n"),
        ("--page 2", "unknown flag --page"),  # no abbreviations
        ("--page-size two", "argument --page-size: invalid int value"),
        ("--device tpu", "argument --device: invalid choice"),
        ("--page-size 0", "--page-size must be at least 1"),
        ("--piecewise-cuda-graph-tokens 16 -1", "-1 is no bucket"),
        ("--config /nowhere.yaml", "--config /nowhere.yaml cannot be read"),
    ],
)
def test_bad_command_line_ends_with_its_reason(capsys, line: str, said: str) -> None:
    with pytest.raises(SystemExit):
        parse(line)
    assert said in capsys.readouterr().err


def test_sub_commands_suggest_their_own_flags(capsys) -> None:
    parser = FlagParser(prog="breakgraph")
    run = parser.add_subparsers().add_parser("run")
    ServerArgs.add_cli_args(run)
    run.add_argument("--questions")
    with pytest.raises(SystemExit):
        parser.parse_args(["run", "--question", "x"])
    assert "did you mean --questions?" in capsys.readouterr().err
    assert parser.parse_args(["run", "--page-size", "4"]).page_size == 4


def test_model_path_is_required(capsys) -> None:
    with pytest.raises(SystemExit):
        prepare_server_args([])
    assert "--model-path is required" in capsys.readouterr().err


def test_command_line_wins_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "args.yaml"
    file.write_text(
        "model_path: m\n--page-size: 4\nmax-running-requests: 8\n"
        "enable-breakable-cuda-graph: true\n"
    )
    args = prepare_server_args(
        ["--config", str(file), "--page-size", "2", "--no-enable-breakable-cuda-graph"]
    )
    assert args == ServerArgs(model_path="m", page_size=2, max_running_requests=8)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("page-sise: 4", "unknown key 'page-sise'; did you mean --page-size?"),
        ("config: other.yaml", "unknown key 'config'"),
        ("- page-size", "must be a mapping of flags"),
        ("page-size: [", "cannot be read"),
        ("page-size: 4\npage_size: 5", "sets --page-size twice"),
        ("page-size: four", "--page-size must be a whole number, not 'four'"),
    ],
)
def test_bad_config_file_says_so(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "args.yaml"
    file.write_text(text)
    with pytest.raises(ValueError) as error:
        ServerArgs.from_cli_args(argparse.Namespace(config=str(file), model_path="m"))
    assert said in str(error.value)


def test_disorder_in_the_buckets_is_said_once(caplog) -> None:
    args = ServerArgs(
        model_path="m",
        device="cpu",
        enable_breakable_cuda_graph=True,
        chunked_prefill_size=64,
        piecewise_cuda_graph_tokens=[64, 16, 16],  # type: ignore[arg-type]
    )
    assert args.piecewise_cuda_graph_tokens == (16, 64)
    assert args.resolved().piecewise_cuda_graph_tokens == (16, 64)
    assert len(caplog.messages) == 2
    assert "sorted" in caplog.text and "repeated" in caplog.text


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"enable_breakable_cuda_graph": True}, "ends at 48 tokens"),
        ({}, "does nothing without --enable-breakable-cuda-graph"),
    ],
)
def test_buckets_that_go_unused_are_said(caplog, values: dict, said: str) -> None:
    ServerArgs(model_path="m", device="cpu", piecewise_cuda_graph_tokens=(48,), **values).resolved()
    assert said in caplog.text


def test_resolved_fills_in_what_the_machine_decides(monkeypatch, caplog) -> None:
    caplog.set_level(logging.WARNING)
    for available, device, chunk in ((False, "cpu", 512), (True, "cuda", 8192)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        args = ServerArgs(model_path="m").resolved()
        assert (args.device, args.chunked_prefill_size) == (device, chunk)
        assert args.piecewise_cuda_graph_tokens == derive_buckets(chunk)
        assert args.resolved() == args
    small = ServerArgs(model_path="m", max_total_tokens=100).resolved()
    assert small.chunked_prefill_size == 100
    assert not caplog.messages


def test_cuda_without_a_device_says_what_to_do(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--device cpu, or install a CUDA build"):
        ServerArgs(model_path="m", device="cuda").resolved()


def test_help_shows_each_flag_and_its_default(capsys) -> None:
    with pytest.raises(SystemExit):
        prepare_server_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert all(flag in text for flag, _, _ in SURFACE)
    assert "at most 12.5% padding" in text and "(default: 2.0)" in text
    assert "SUPPRESS" not in text


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("values", "env", "prefill", "decode"),
    [
        ({}, None, "disabled", None),
        ({}, "1", "disabled", "breakable"),
        ({}, "0", "disabled", None),
        ({"enable_breakable_cuda_graph": True}, None, "breakable", None),
        ({"cuda_graph_backend_prefill": "breakable"}, None, "breakable", None),
        ({"cuda_graph_backend_prefill": "full"}, None, "full", None),
        ({"cuda_graph_backend_prefill": "auto"}, None, "auto", None),
        ({"cuda_graph_backend_decode": "full"}, None, "disabled", "full"),
        ({"cuda_graph_backend_decode": "breakable"}, "1", "disabled", "breakable"),
        ({"cuda_graph_backend_decode": "disabled"}, "1", "disabled", "disabled"),
        ({"cuda_graph_bs": [1, 8]}, None, "disabled", "full"),
        ({"disable_cuda_graph": True}, "1", "disabled", "disabled"),
        (
            {"disable_cuda_graph": True, "enable_breakable_cuda_graph": True},
            None,
            "breakable",
            "disabled",
        ),
    ],
)
def test_older_flags_and_environment_set_the_backends(
    monkeypatch, device: str, values: dict, env: str | None, prefill: str, decode: str | None
) -> None:
    monkeypatch.delenv("BREAKGRAPH_USE_BREAKABLE_CUDA_GRAPH", raising=False)
    if env is not None:
        monkeypatch.setenv("BREAKGRAPH_USE_BREAKABLE_CUDA_GRAPH", env)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device == "cuda")
    args = ServerArgs(model_path="m", **values).resolved()
    default = "full" if device == "cuda" else "disabled"
    assert args.cuda_graph_backend_prefill == prefill
    assert args.cuda_graph_backend_decode == (decode or default)
    assert args.enable_breakable_cuda_graph == (prefill in ("breakable", "auto"))
    assert args.resolved() == args


def test_full_decode_and_the_breakable_environment_contradict_each_other(monkeypatch) -> None:
    monkeypatch.setenv("BREAKGRAPH_USE_BREAKABLE_CUDA_GRAPH", "1")
    args = ServerArgs(model_path="m", cuda_graph_backend_decode="full")
    with pytest.raises(ValueError, match=r"decode full and BREAKGRAPH_USE.*=1 contradict"):
        args.resolved()


def test_as_many_states_as_requests_are_enough() -> None:
    args = ServerArgs(model_path="m", max_mamba_cache_size=8, max_running_requests=8)
    assert args.resolved().max_mamba_cache_size == 8
    args = parse("--max-mamba-cache-size 80 --linear-attention-capture 4")
    assert (args.max_mamba_cache_size, args.linear_attention_capture) == (80, 4)


def test_decode_batch_sizes_are_derived_from_the_most_requests(monkeypatch) -> None:
    for most, ladder in {
        1: (1,),
        3: (1, 2, 3),
        8: (1, 2, 4, 8),
        20: (1, 2, 4, 8, 16, 20),
        64: (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64),
    }.items():
        args = ServerArgs(model_path="m", max_running_requests=most).resolved()
        assert args.cuda_graph_bs == ladder


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"debug_cuda_graph": True}, "--debug-cuda-graph does nothing"),
        ({"verify_prefill_graph": 0.01}, "--verify-prefill-graph does nothing without"),
        (
            {"linear_attention_capture": 2},
            "--linear-attention-capture does nothing without --enable-breakable-cuda-graph",
        ),
        ({"prefill_graph_requests": 4}, "--prefill-graph-requests does nothing"),
        ({"cuda_graph_memory_budget": 2.0}, "--cuda-graph-memory-budget does nothing"),
        (
            {"cuda_graph_backend_prefill": "full", "linear_attention_capture": 2},
            "--linear-attention-capture does nothing",
        ),
        (
            {"cuda_graph_bs": [3], "cuda_graph_backend_decode": "disabled"},
            "--cuda-graph-bs does nothing",
        ),
    ],
)
def test_graph_flags_that_do_nothing_are_said(caplog, values: dict, said: str) -> None:
    ServerArgs(model_path="m", device="cpu", **values).resolved()
    assert said in caplog.text
