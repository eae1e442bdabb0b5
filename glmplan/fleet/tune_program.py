"""A program that is sent to a host: it runs the tuner with this Python and prints every table, so that the log holds all.

`tune_program.py FOLDER WORDS...`: FOLDER/known.json ({"tables": {file name: content}, "gains": {...}}) becomes the tables
that the tuner finds there already; WORDS are the tuner's own. Its events (one JSON object a line) pass through; a line
{"kind": "table", "file", "table", "gains"} follows each shape that is done or was kept. Standard library only.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

TUNER = "glmplan.kernels.engines.sglang_tune"
KNOWN = "known.json"


def main(words: list[str]) -> int:
    """The tuner's exit status."""
    folder = Path(words[0])
    tables = folder / "tables"
    _put_known(folder / KNOWN, tables)
    command = [sys.executable, "-m", TUNER, "--out", str(tables), "--json-lines", *words[1:]]
    with subprocess.Popen(command, cwd=tables, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as tuner:
        assert tuner.stdout is not None
        for line in tuner.stdout:
            print(line, end="", flush=True)
            _print_table(line)
    return tuner.returncode


def _put_known(known: Path, tables: Path) -> None:
    (tables / "gains").mkdir(parents=True, exist_ok=True)
    if not known.exists():
        return
    found = json.loads(known.read_text())
    for name, content in found["tables"].items():
        (tables / Path(name).name).write_text(json.dumps(content))
    for name, content in found["gains"].items():
        (tables / "gains" / Path(name).name).write_text(json.dumps(content))


def _print_table(line: str) -> None:
    """The table of a shape that is done, after its event."""
    try:
        event: Any = json.loads(line)
    except ValueError:
        return
    if not isinstance(event, dict) or event.get("kind") not in ("done", "kept") or not event.get("file"):
        return
    path = Path(event["file"])
    gains = path.parent / "gains" / path.name
    told = {"kind": "table", "file": path.name, "table": json.loads(path.read_text())}
    told["gains"] = json.loads(gains.read_text()) if gains.exists() else None
    print(json.dumps(told), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
