"""A Python with an engine and a GPU, for tests: the real tuner with a bench that works its times out instead of measuring.

`fake_python(folder)` makes an environment of this shape; its `settings.json` says how slow each case is and what goes wrong.
With `hold`, a path, case number `hold_from` (1 by default) and those after it wait until there is a file.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

TUNER = "glmplan.kernels.engines.sglang_tune"


def fake_python(folder: Path, version: str = "0.5.23", **settings: Any) -> Path:
    """An environment with SGLang as `facts` sees it; its Python runs this file."""
    site = folder / "lib" / "python3.12" / "site-packages"
    (site / f"sglang-{version}.dist-info").mkdir(parents=True)
    (folder / "bin").mkdir()
    (folder / "pyvenv.cfg").write_text("home = /usr/bin\nversion = 3.12.3\n")
    (folder / "settings.json").write_text(json.dumps({"version": version, **settings}))
    python = folder / "bin" / "python3"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).resolve()} "$0" "$@"\n')
    python.chmod(0o755)
    return python


class Case:
    """Times that depend on the tile alone: BLOCK_SIZE_M 16 and four stages are fastest."""

    default = None

    def __init__(self, settings: dict[str, Any], rows: int) -> None:
        self.settings, self.rows = settings, rows

    def compile_ahead(self, wanted: list[dict[str, int]]) -> None:
        """Nothing to compile."""

    def time_us(self, config: dict[str, int] | None) -> float:
        if config is None:
            time.sleep(self.settings.get("case_s", 0.0))
            return 30.0 + self.rows
        best = config["BLOCK_SIZE_M"] == 16 and config["num_stages"] == 4
        return (15.0 if best else 20.0) + self.rows / 2

    def require_agreement(self, config: dict[str, int]) -> None:
        if self.settings.get("wrong"):
            from glmplan.errors import WrongAnswersError

            raise WrongAnswersError("A tile gives results 0.5 away from the engine's default.")


class Bench:
    """What the tuner asks of a GPU."""

    device_name, shared_bytes, smallest_k = "NVIDIA H200", 232_448, 64

    def __init__(self, settings: dict[str, Any]) -> None:
        from glmplan.errors import UnsupportedError

        if settings.get("no_cuda"):
            raise UnsupportedError("No CUDA GPU is visible to PyTorch.", "Tune on a machine with the GPU to tune for.")
        self.settings, self.setting = settings, {"gpu": self.device_name, "sglang": settings["version"]}
        self.cases = 0
        noted = Path(settings.get("notes", os.devnull))
        with noted.open("a") as out:
            out.write(
                json.dumps({"pid": os.getpid(), "gpus": os.environ.get("CUDA_VISIBLE_DEVICES"), "argv": sys.argv}) + "\n"
            )

    def case(self, shape: Any, rows: int) -> Case:
        self.cases += 1
        if self.cases >= self.settings.get("hold_from", 1):
            while not Path(self.settings.get("hold", "/")).exists():
                time.sleep(0.05)
        return Case(self.settings, rows)


class ExpertCase:
    """Times as Case's, for both GEMMs; grouping costs the second one."""

    kept_default = None

    def __init__(self, settings: dict[str, Any], rows: int) -> None:
        self.settings, self.rows = settings, rows
        with Path(f"{settings.get('notes', os.devnull)}.experts").open("a") as out:
            out.write(f"{rows}\n")

    def compile_ahead(self, wanted: Any) -> None:
        pass

    def time_us(self, part: str, config: dict[str, int]) -> float:
        return Case(self.settings, self.rows).time_us(config) + (config["GROUP_SIZE_M"] if part == "down" else 0)

    def pair_us(self, configs: Any) -> float:
        if configs is None:
            time.sleep(self.settings.get("case_s", 0.0))
            return 90.0 + self.rows
        return sum(self.time_us(part, config) for part, config in zip(("up", "down"), configs, strict=True))


class ExpertBench(Bench):
    """What the tuner of experts asks of a GPU."""

    folder = "configs/triton_3_8_0"

    def layer(self, shape: Any, most_rows: int) -> Any:
        if self.settings.get("small"):
            from glmplan.errors import DoesNotFitError

            raise DoesNotFitError("256 experts take 9.7 GB to tune.", "Tune with a larger --tp-size.")

        def case(rows: int) -> ExpertCase:
            self.case(shape, rows)
            return ExpertCase(self.settings, rows)

        return SimpleNamespace(case=case)


def main() -> None:
    """As `python3 WORDS...` would, with the tuner's two doors to the hardware replaced."""
    python, *words = sys.argv[1:]
    settings = json.loads((Path(python).parents[1] / "settings.json").read_text())
    sys.executable = python
    if words[:2] == ["-m", TUNER]:
        import importlib

        sys.path[:] = [entry for entry in sys.path if "site-packages" not in entry or entry.startswith("/usr")]
        tuner: Any = importlib.import_module(TUNER)
        assert tuner.__file__.startswith(os.environ["PYTHONPATH"]), "the kernels that were sent are used"
        if settings.get("crash"):
            os.abort()
        tuner.engine_version = lambda: settings["version"]
        tuner.Bench = lambda: Bench(settings)
        tuner.ExpertBench = lambda: ExpertBench(settings)
        tuner.device_sm = lambda: 89
        sys.argv = ["sglang_tune", *words[2:]]
        print("a library prints this", file=sys.stderr)
        sys.exit(tuner.main(words[2:]))
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    main()
