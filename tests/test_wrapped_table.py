"""Each row of the table in docs/models.md says what becomes of the class, and none is unchecked."""

from __future__ import annotations

import pytest
import wrapped_support as support

frozen_heap = support.frozen_heap


def documented_rows() -> dict[str, str]:
    lines = support.DOCUMENT.read_text().splitlines()
    return {line.split("|")[1].strip(): line for line in lines if line.startswith("| ")}


@pytest.mark.parametrize("name", support.DECODERS)
def test_decoder_is_what_the_table_says(name: str) -> None:
    outcome = support.try_decoder(name)
    assert outcome.row == documented_rows()[name]
    assert outcome.spread > 0.05  # else the tolerance would mean nothing
    assert outcome.error <= 1e-4
    assert outcome.same_text


@pytest.mark.parametrize("name", support.ENCODERS)
def test_encoder_is_what_the_table_says(name: str) -> None:
    outcome = support.try_encoder(name)
    assert outcome.row == documented_rows()[name]
    assert outcome.spread > 0.001
    assert outcome.error <= 1e-4


def test_table_has_no_row_that_is_not_checked() -> None:
    rows = set(documented_rows()) - {"class", "---"}
    assert rows == {*support.DECODERS, *support.ENCODERS}
