"""How tests get an nvidia-smi without a driver: a program of that name that prints recorded output.

A folder of tests/recorded/nvidia-smi holds `query.csv` (with a head line, so that unknown fields are refused as the real
program refuses them), `compute-apps.csv`, `nvlink-s.txt`, `topo-*.txt`, `version.txt` and `plain.txt`; or `fail.txt`: an
exit status and what is printed instead of anything else. What is absent is answered as by a program that is too old.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

RECORDED = Path(__file__).parent / "recorded" / "nvidia-smi"

PROGRAM = """#!{python}
import sys
from pathlib import Path
folder, words = Path({folder!r}), sys.argv[1:]

def show(name):
    path = folder / name
    if path.exists():
        sys.stdout.write(path.read_text())
        sys.exit(0)
    print("Invalid combination of input arguments. Please run 'nvidia-smi -h' for help.")
    sys.exit(1)

if (folder / "fail.txt").exists():
    status, _, text = (folder / "fail.txt").read_text().partition("\\n")
    sys.stdout.write(text)
    sys.exit(int(status))
first = words[0] if words else ""
if first.startswith("--query-gpu="):
    head, *lines = (folder / "query.csv").read_text().splitlines()
    known, asked = head.split(", "), first.partition("=")[2].split(",")
    for field in asked:
        if field not in known:
            print(f'Field "{{field}}" is not a valid field to query.\\n')
            sys.exit(2)
    for line in lines:
        row = dict(zip(known, line.split(", ")))
        print(", ".join(row[field] for field in asked))
elif first.startswith("--query-compute-apps"):
    show("compute-apps.csv")
elif first == "topo":
    show("-".join(["topo", *(word.lstrip("-") for word in words[1:])]) + ".txt")
else:
    show({{"nvlink": "nvlink-s.txt", "--version": "version.txt", "": "plain.txt"}}[first])
"""


def environment(folder: Path, recorded: str) -> dict[str, str]:
    """The environment of a process that has no pynvml and finds this nvidia-smi; `folder` is for its files."""
    program = folder / "nvidia-smi"
    program.write_text(PROGRAM.format(python=sys.executable, folder=str(RECORDED / recorded)))
    program.chmod(0o755)
    (folder / "pynvml.py").write_text("raise ImportError('hidden by a test')\n")
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": str(folder)}
