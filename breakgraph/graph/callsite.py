"""Where in the user's code something happened, for an error to name."""

from __future__ import annotations

import os
import sys

import torch

_INTERNAL = (os.path.dirname(torch.__file__) + os.sep, os.path.dirname(__file__) + os.sep)


def call_site() -> str:
    """``file:line in function`` of the innermost frame outside torch and this package."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_INTERNAL):
        frame = frame.f_back  # type: ignore[assignment]
    if frame is None:
        return "unknown call site"
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"
