"""Tasks for lm-evaluation-harness: the protocols' own prompts and grades, over local files."""

from pathlib import Path

FOLDER = Path(__file__).parent
