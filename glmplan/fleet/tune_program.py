"""A program that is sent to a host: it runs the tuner with this Python and prints every table, so that the log holds all.

`tune_program.py FOLDER WORDS...`: FOLDER/known.json ({"tables": {path: content}, "gains": {...}, "partial": {...}}) becomes
what the tuner finds there already; WORDS are the tuner's own. Its events (one JSON object a line) pass through; a line
{"kind": "table", "file", "table", "gains"} follows for each table of a shape that is done or was kept, and {"kind":
"partial", "file", "content"} after each number of rows of a shape that is kept row by row. Standard library only.
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
            _print_table(line, tables)
    return tuner.returncode


def _put_known(known: Path, tables: Path) -> None:
    (tables / "gains").mkdir(parents=True, exist_ok=True)
    if not known.exists():
        return
    found = json.loads(known.read_text())
    for below, kind in ((".", "tables"), ("gains", "gains"), ("partial", "partial")):
        for name, content in found.get(kind, {}).items():
            path = (tables / below / name).resolve()
            if tables.resolve() not in path.parents:
                raise ValueError(f"{name} is not below {tables}")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content))


def _print_table(line: str, tables: Path) -> None:
    """The tables of a shape that is done, or what is known of its rows, after its event."""
    try:
        event: Any = json.loads(line)
    except ValueError:
        return
    if not isinstance(event, dict) or not event.get("file"):
        return
    if event.get("kind") == "rows" and event.get("partial"):
        partial = Path(event["partial"])
        name = str(partial.relative_to(tables / "partial"))
        print(json.dumps({"kind": "partial", "file": name, "content": json.loads(partial.read_text())}), flush=True)
    if event.get("kind") not in ("done", "kept"):
        return
    first = Path(event["file"])
    second = first.with_name(first.name[: -len(".json")] + "_down.json")
    for path in (second, first) if event.get("experts") else (first,):
        name = str(path.relative_to(tables))
        gains = tables / "gains" / name
        told = {"kind": "table", "file": name, "table": json.loads(path.read_text())}
        told["gains"] = json.loads(gains.read_text()) if gains.exists() else None
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
