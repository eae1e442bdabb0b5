"""Run the program in this process as its entry point does."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest

from glmplan.cli.app import main


class Ran(NamedTuple):
    """What a command printed and its exit code."""

    code: int
    out: str
    err: str


@pytest.fixture
def glmplan(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    """`glmplan("size", "--gpu", "h200")` runs the command line."""

    def run(*arguments: str) -> Ran:
        monkeypatch.setattr("sys.argv", ["glmplan", *arguments])
        monkeypatch.setenv("COLUMNS", "140")
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as exit_:
            code = exit_.code if isinstance(exit_.code, int) else 1
        printed = capsys.readouterr()
        return Ran(code, printed.out, printed.err)

    return run
