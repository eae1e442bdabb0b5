"""Whether a model folder is whole: its index against the files there, and each file against its own header.

A safetensors file begins with an 8-byte little-endian length and that many bytes of JSON; its tensors end where the file
ends. Only headers are read. A repository name (`zai-org/GLM-5.2-FP8`) is looked up in the Hugging Face cache.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from . import procfs

INDEX = "model.safetensors.index.json"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "tekken.json")
HEADER_LIMIT_BYTES = 100_000_000
NAMED = 5
READERS = 8


def model_files(path: str) -> dict[str, Any]:
    """The folder judged; `missing` and `wrong` name the first files of each kind, `wrong` with the reason."""
    folder = find_folder(path)
    found: dict[str, Any] = {"path": folder or path, "exists": folder is not None}
    if folder is None:
        return found
    expected, broken = _expected(folder)
    there = sorted(os.path.basename(one) for one in glob.glob(os.path.join(glob.escape(folder), "*.safetensors")))
    wanted = expected or there
    present = [name for name in wanted if name in set(there)]
    with ThreadPoolExecutor(max_workers=READERS) as pool:
        judged = list(pool.map(lambda name: check_file(os.path.join(folder, name)), present))
    wrong = [f"{name}: {problem}" for name, (_, problem) in zip(present, judged) if problem]
    return {
        **found,
        "config": _is_object(os.path.join(folder, "config.json")),
        "tokenizer": any(os.path.isfile(os.path.join(folder, name)) for name in TOKENIZERS),
        "files_expected": len(expected) if expected else None,
        "files_present": len(present),
        "bytes_present": sum(size for size, _ in judged),
        "missing": [name for name in wanted if name not in set(there)][:NAMED],
        "wrong": ([f"{INDEX}: {broken}"] if broken else []) + wrong[:NAMED],
        "index_digest": _digest(os.path.join(folder, INDEX)),
        "config_digest": _digest(os.path.join(folder, "config.json")),
    }


def find_folder(path: str) -> str | None:
    """The folder that an engine would load for this path or repository name."""
    plain = os.path.expanduser(path)
    if os.path.isdir(plain):
        return os.path.abspath(plain)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        return None
    home = os.environ.get("HF_HOME") or os.path.expanduser("~/.cache/huggingface")
    hub = os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")
    cached = os.path.join(hub, "models--" + path.replace("/", "--"))
    revision = procfs.read_text(os.path.join(cached, "refs", "main"))
    folder = os.path.join(cached, "snapshots", revision or "-")
    return folder if os.path.isdir(folder) else None


def _expected(folder: str) -> tuple[list[str], str | None]:
    """The files that the index names, and what is wrong with the index itself."""
    path = os.path.join(folder, INDEX)
    if not os.path.exists(path):
        return [], None
    try:
        with open(path, encoding="utf-8") as stream:
            names = set(json.load(stream)["weight_map"].values())
        return sorted(os.path.basename(str(name)) for name in names), None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [], f"cannot be read ({type(error).__name__})"


def check_file(path: str) -> tuple[int, str | None]:
    """The bytes of one file, and its problem: too short, too long, or no safetensors."""
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as stream:
            prefix = stream.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(size - 8, HEADER_LIMIT_BYTES):
                return size, f"{size:,} bytes hold no whole safetensors header"
            header = json.loads(stream.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        promised = 8 + length + max(ends, default=0)
    except OSError as error:
        return 0, f"cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return size, "its header is not safetensors JSON"
    if promised != size:
        return size, f"{size:,} bytes, its header promises {promised:,}"
    return size, None


def _is_object(path: str) -> bool:
    try:
        with open(path, encoding="utf-8") as stream:
            return isinstance(json.load(stream), dict)
    except (OSError, ValueError):
        return False


def _digest(path: str) -> str | None:
    """The first 16 hexadecimal digits of the content's SHA-256: equal on two nodes where the files are."""
    try:
        with open(path, "rb") as stream:
            return hashlib.sha256(stream.read()).hexdigest()[:16]
    except OSError:
        return None
