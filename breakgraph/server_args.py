"""Every flag, in one frozen dataclass that is also its own command-line parser.

A `ServerArgs` that exists is valid: it is checked once, when it is made, whether its values came
from the command line, a `--config` file or keyword arguments. A flag is written once, as a field:
its name, type, choices, default, help and lower bound all come from there.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, Literal, TypeVar, get_type_hints

from breakgraph.flag_checks import DEFAULT_SLOTS, check_together, check_values, warn_of_idle_flags
from breakgraph.flag_parser import FlagParser, checked, flag_name, parser_options, read_config

__all__ = ["FlagParser", "ServerArgs", "flag_name", "prepare_server_args"]

logger = logging.getLogger(__name__)

# A CPU forward is bound by arithmetic, so a longer chunk gains nothing there, and a CPU tape keeps
# every intermediate of its bucket.
DEFAULT_CHUNK = {"cuda": 8192, "cpu": 512}

BREAKABLE_DECODE_ENV = "BREAKGRAPH_USE_BREAKABLE_CUDA_GRAPH"

T = TypeVar("T")


def _flag(default: T, help: str, minimum: int | None = None, text: str | None = None) -> T:
    """A field; ``text`` names what a string holds where it is no path."""
    return field(default=default, metadata={"help": help, "minimum": minimum, "text": text})


@dataclass(kw_only=True, slots=True, frozen=True)
class ServerArgs:
    """What to load and how to run it. Raises ValueError, naming the flag, on a bad value."""

    model_path: str = field(metadata={"help": "folder with config.json and safetensors"})
    tokenizer_path: str | None = _flag(None, "folder with the tokenizer (default: the model's)")
    skip_tokenizer_init: bool = _flag(False, "load no tokenizer; prompts are token ids")
    load_format: Literal["auto", "dummy"] = _flag(
        "auto", "auto reads the weights; dummy fills them at random, from config.json alone"
    )
    model_impl: Literal["auto", "native", "transformers"] = _flag(
        "auto",
        "native runs our own file for the architecture, transformers its class there; auto is "
        "transformers where there is no file",
    )
    trust_remote_code: bool = _flag(
        False, "run code that comes with the model folder; read it first"
    )
    enable_torch_compile: bool = _flag(
        False,
        "of a model that runs through its transformers class, compile what it does to each row "
        "alone and no fused kernel does; start-up says how long that took",
    )
    device: Literal["auto", "cuda", "cpu"] = _flag("auto", "auto is cuda where torch sees one")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _flag(
        "auto", "type of weights and activations; auto follows config.json"
    )
    attention_backend: Literal["auto", "torch_flash", "flashinfer", "torch_native"] = _flag(
        "auto",
        "auto is flashinfer in half precision on Hopper GPUs where it is installed and serves the "
        "model, else torch_flash in half precision on cuda, else torch_native",
    )
    enable_breakable_cuda_graph: bool = _flag(
        False, "capture prefill once per token bucket and replay it, attention run in the breaks"
    )
    cuda_graph_backend_prefill: Literal["breakable", "full", "auto", "disabled"] | None = _flag(
        None,
        "how prefill is captured: breakable runs attention in breaks, full captures it too for up "
        "to --prefill-graph-requests; auto has both and takes what is fastest for each batch "
        "(default: breakable with --enable-breakable-cuda-graph, else disabled)",
    )
    prefill_graph_requests: int = _flag(
        DEFAULT_SLOTS, "most requests of a batch that a full prefill graph holds", minimum=1
    )
    cuda_graph_memory_budget: float | None = _flag(
        None,
        "gigabytes that prefill graphs may take; those go first that save least (default: no "
        "bound)",
    )
    cuda_graph_backend_decode: Literal["full", "breakable", "disabled"] | None = _flag(
        None,
        "how decode is captured: full is one segment, breakable breaks where the model is marked "
        f"(default: full on cuda, disabled on cpu; breakable with {BREAKABLE_DECODE_ENV}=1)",
    )
    disable_cuda_graph: bool = _flag(
        False, "decode eagerly: the same as --cuda-graph-backend-decode disabled"
    )
    cuda_graph_bs: tuple[int, ...] | None = _flag(
        None, "batch sizes of decode to capture (default: 1 2 4 8 16 24 … --max-running-requests)"
    )
    cuda_graph_failure: Literal["auto", "error", "eager"] = _flag(
        "auto",
        "what a failed capture does: error ends the start, eager logs why and goes on; auto is "
        "eager for a model that runs through its transformers class, else error",
    )
    debug_cuda_graph: bool = _flag(
        False, "run each forward as one break of its graph, so that print and breakpoint work"
    )
    linear_attention_capture: int = _flag(
        0,
        "capture Mamba2 and delta-rule calls inside the prefill graphs too, for batches of up to "
        "this many requests; larger ones take the eager breaks, as all do at 0",
        minimum=0,
    )
    piecewise_cuda_graph_tokens: tuple[int, ...] | None = _flag(
        None, "token buckets to capture (default: derived, at most 12.5% padding)"
    )
    max_prefill_padding: float = _flag(
        2.0, "run eagerly rather than in a bucket of more than this many times the tokens"
    )
    prefill_dispatch: Literal["auto", "measured", "always"] = _flag(
        "auto",
        "measured: run eagerly what timings at this start show to be faster so; always: replay all "
        "that fits a bucket; auto is always on cpu, and on cuda measured once and kept for later "
        "starts",
    )
    verify_prefill_graph: float = _flag(
        0.0,
        "share of the replayed prefills, 0 to 1, that run eagerly too after their reply is out; a "
        "bucket that gives other results goes out of service",
    )
    tp_size: int = _flag(
        1,
        "ranks that share the model, a GPU each: spawned, unless torchrun started them",
        minimum=1,
    )
    dp_size: int = _flag(
        1,
        "groups that the ranks are divided into, a divisor of --tp-size: each holds requests of "
        "its own, and all share the experts of a mixture-of-experts model",
        minimum=1,
    )
    moe_scatter: bool = _flag(
        False, "each rank normalises and routes its own rows before experts (needs --tp-size)"
    )
    matrix_products: Literal["auto", "cublas"] = _flag(
        "auto", "what multiplies with a weight: auto is our own kernels where they gain"
    )
    chunked_prefill_size: int | None = _flag(
        None, "most tokens of one prefill forward (default: 8192 on cuda, 512 on cpu)", minimum=1
    )
    max_total_tokens: int | None = _flag(
        None,
        "tokens that the KV cache holds (default: what --mem-fraction-static leaves)",
        minimum=1,
    )
    max_mamba_cache_size: int | None = _flag(
        None,
        "recurrent states kept by a hybrid model, of running requests and of cached prefixes "
        "(default: twice --max-running-requests, or what fits)",
        minimum=1,
    )
    mem_fraction_static: float = _flag(
        0.8, "share of device memory for weights, KV cache and graphs, between 0 and 1"
    )
    max_running_requests: int = _flag(64, "most requests in one batch", minimum=1)
    max_queued_requests: int = _flag(
        1024, "most requests that wait to run; the server refuses more", minimum=1
    )
    page_size: int = _flag(1, "tokens in a page of the KV cache", minimum=1)
    disable_radix_cache: bool = _flag(
        False, "forget a prompt's keys and values once it is answered; share none between prompts"
    )
    is_embedding: bool = _flag(False, "serve embeddings in place of logits")
    pooling: Literal["auto", "last", "mean", "cls"] = _flag(
        "auto",
        "how --is-embedding makes one vector of a sequence; auto follows the folder's "
        "sentence-transformers files, else last, or mean for encoders",
    )
    random_seed: int = _flag(0, "seed of sampling and of dummy weights", minimum=0)
    log_level: Literal["debug", "info", "warning", "error"] = _flag(
        "info", "least severe line logged"
    )
    host: str = _flag("127.0.0.1", "address the server listens on; 0.0.0.0 is every one", text="IP")
    port: int = _flag(30000, "port the server listens on; 0 takes a free one", minimum=0)
    api_key: str | None = _flag(
        None, "key that every request to the server but /health must bear", text="KEY"
    )
    served_model_name: str | None = _flag(
        None, "name that requests call the model by (default: --model-path)", text="NAME"
    )
    chat_template: str | None = _flag(
        None, "Jinja file that turns chat messages into a prompt (default: the tokenizer's own)"
    )
    max_body_bytes: int = _flag(4 << 20, "largest request body the server reads", minimum=1024)
    max_choices: int = _flag(
        128, "most prompts times n, or texts, in one request to the server", minimum=1
    )
    request_seconds: float = _flag(600.0, "longest a request to the server may take")
    drain_seconds: float = _flag(30.0, "longest the server finishes requests after SIGTERM")

    def __post_init__(self) -> None:
        for f in fields(self):
            value = checked(flag_name(f.name), _HINTS[f.name], getattr(self, f.name))
            object.__setattr__(self, f.name, value)  # frozen: an int for a float, a list of buckets
            minimum = f.metadata.get("minimum")
            if minimum is not None and value is not None and value < minimum:
                raise ValueError(f"{flag_name(f.name)} must be at least {minimum}, not {value}")
        check_values(self)
        check_together(self)
        self._put_ladders_in_order()

    def _put_ladders_in_order(self) -> None:
        from breakgraph.runner.buckets import check_batch_sizes, check_buckets  # which imports this

        checks: tuple[tuple[str, Any, int | None], ...] = (
            ("piecewise_cuda_graph_tokens", check_buckets, self.chunked_prefill_size),
            ("cuda_graph_bs", check_batch_sizes, self.max_running_requests),
        )
        for name, check, most in checks:
            if (asked := getattr(self, name)) is not None:
                ladder, notes = check(asked, most)
                object.__setattr__(self, name, ladder)
                for note in notes:
                    logger.warning("%s", note)

    def _graph_backends(self, device: str) -> tuple[Any, Any]:
        """What captures prefill, and what captures decode."""
        on = self.enable_breakable_cuda_graph
        prefill = self.cuda_graph_backend_prefill or ("breakable" if on else "disabled")
        decode, env = self.cuda_graph_backend_decode, os.environ.get(BREAKABLE_DECODE_ENV)
        if decode is None:
            decode = "full" if device == "cuda" or self.cuda_graph_bs else "disabled"
            decode = (
                "disabled" if self.disable_cuda_graph else "breakable" if env == "1" else decode
            )
        elif decode == "full" and env == "1":
            raise ValueError(
                f"--cuda-graph-backend-decode full and {BREAKABLE_DECODE_ENV}=1 contradict each "
                "other; leave one out"
            )
        return prefill, decode

    @property
    def graph_slots(self) -> int:
        """Requests that a full prefill graph has room for."""
        return min(self.prefill_graph_requests, self.max_running_requests)

    def resolved(self) -> ServerArgs:
        """These arguments with what this machine decides filled in: device, graphs and buckets.

        Other flags may stay "auto": what decides them is known once the model is loaded.
        """
        import torch

        from breakgraph.runner.buckets import derive_batch_sizes, derive_buckets

        device = self.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        elif device == "cuda" and not torch.cuda.is_available():
            raise ValueError(
                f"--device cuda: torch {torch.__version__} sees no CUDA device; use --device cpu, "
                "or install a CUDA build of torch: pip install 'breakgraph[cuda]'"
            )
        default = DEFAULT_CHUNK[device]
        chunk = self.chunked_prefill_size or min(default, self.max_total_tokens or default)
        derived = derive_buckets(chunk)
        ladder = self.piecewise_cuda_graph_tokens or derived
        prefill, decode = self._graph_backends(device)
        sizes = derive_batch_sizes(self.max_running_requests)
        warn_of_idle_flags(
            self,
            *(prefill, decode),
            own_ladder=ladder != derived,
            own_sizes=self.cuda_graph_bs not in (None, sizes),
        )
        if prefill != "disabled" and ladder[-1] < chunk:
            logger.warning(
                "--piecewise-cuda-graph-tokens ends at %d tokens: batches up to "
                "--chunked-prefill-size %d run eagerly",
                *(ladder[-1], chunk),
            )
        return replace(
            self,
            device=device,
            enable_breakable_cuda_graph=prefill in ("breakable", "auto"),
            cuda_graph_backend_prefill=prefill,
            cuda_graph_backend_decode=decode,
            cuda_graph_bs=None if self.disable_cuda_graph else self.cuda_graph_bs or sizes,
            chunked_prefill_size=chunk,
            piecewise_cuda_graph_tokens=ladder,
        )

    @staticmethod
    def add_cli_args(parser: argparse.ArgumentParser) -> None:
        """Add every flag, and `--config`, to `parser`. A flag not given leaves no attribute."""
        group = parser.add_argument_group("engine")
        for f in fields(ServerArgs):
            action = group.add_argument(
                flag_name(f.name), default=argparse.SUPPRESS, **parser_options(_HINTS[f.name])
            )
            action.metavar = f.metadata.get("text") or action.metavar
            said = f.default in (MISSING, None) or "(default" in f.metadata["help"]
            text = f.metadata["help"] + ("" if said else f" (default: {f.default})")
            action.help = text.replace("%", "%%")
        group.add_argument(
            "--config",
            metavar="FILE.yaml",
            default=argparse.SUPPRESS,
            help="flags as a YAML mapping; the command line wins over it",
        )

    @classmethod
    def from_cli_args(cls, namespace: argparse.Namespace) -> ServerArgs:
        """What `add_cli_args` parsed, over the `--config` file. Raises ValueError."""
        path = getattr(namespace, "config", None)
        values = {} if path is None else read_config(path, _HINTS)
        values |= {
            f.name: getattr(namespace, f.name) for f in fields(cls) if hasattr(namespace, f.name)
        }
        if "model_path" not in values:
            raise ValueError("--model-path is required, as a flag or in the --config file")
        return cls(**values)


_HINTS: dict[str, Any] = get_type_hints(ServerArgs)


def prepare_server_args(argv: Sequence[str]) -> ServerArgs:
    """Parse a command line of engine flags alone; a mistake ends the program with its reason."""
    parser = FlagParser(prog="breakgraph")
    ServerArgs.add_cli_args(parser)
    try:
        return ServerArgs.from_cli_args(parser.parse_args(argv))
    except ValueError as error:
        parser.error(str(error))
