"""The public question files, fetched once; none is used that is not what its checksum says."""

from __future__ import annotations

import hashlib
import os
import urllib.request
from pathlib import Path

from breakgraph.kept_files import kept_path

GSM8K = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/"
MGSM = "https://raw.githubusercontent.com/google-research/url-nlp/main/mgsm/"
PUBLIC = {
    "gsm8k": (
        GSM8K + "test.jsonl",
        "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
    ),
    "mgsm": (
        MGSM + "mgsm_en.tsv",
        "50021d0f28cc957edcb44e7806425b1c7fbd648ddcb9e0a8ec689d10e57d40fa",
    ),
}


def public_file(task: str) -> Path:
    """The file that ``task`` asks without ``--data-path``, from the user's cache or its origin.

    Raises:
        ValueError: it can be had from neither; the message says which file to give.
    """
    url, checksum = PUBLIC[task]
    path = kept_path(task) / url.rpartition("/")[2]
    if path.exists() and _checksum(path.read_bytes()) == checksum:
        return path
    give = f"give a copy of {url} with --data-path {path.name}"
    try:
        with urllib.request.urlopen(url, timeout=20) as reply:
            data = reply.read()
    except OSError as error:
        raise ValueError(f"the questions of {task} cannot be fetched ({error}); {give}") from error
    if _checksum(data) != checksum:
        raise ValueError(f"{url} is not the file it was (its SHA-256 differs); {give}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_bytes(data)
        part.replace(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error}); {give}") from error
    return path


def _checksum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
