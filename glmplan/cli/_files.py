"""Files of the user: written whole or not at all, read back with every problem as a sentence."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from pydantic import ValidationError

from glmplan.errors import UsageError
from glmplan.facts.model_config import first_problem, read_json
from glmplan.planning.plan import Plan


def check_writable(path: Path, force: bool) -> None:
    """Refuse early: an existing file without --force, or a folder that is not there."""
    if path.is_dir():
        raise UsageError(f"{path} is a folder.", "Name a file.")
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} is not a regular file.", "Name another file; --json prints the plan to stdout.")
    if path.exists() and not force:
        raise UsageError(f"{path} exists already.", "Choose another name, or add --force to overwrite it.")
    if not path.resolve().parent.is_dir():
        raise UsageError(f"The folder {path.resolve().parent} does not exist.", "Create it first.")


def save_plan(plan: Plan, path: Path) -> None:
    """Write the plan for `launch --plan`."""
    save_text(plan.model_dump_json(indent=1) + "\n", path)


def save_text(text: str, path: Path) -> None:
    """Write beside the place and move it there, so that a crash leaves the old file; links are followed."""
    place = path.resolve()
    try:
        handle, temporary = tempfile.mkstemp(dir=place.parent, prefix=f".{place.name}.")
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}.", "Choose a folder you may write to.") from None
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, place.stat().st_mode & 0o777 if place.exists() else 0o666 & ~mask)
        os.replace(temporary, place)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load_plan(path: Path) -> Plan:
    """A saved plan; a file of another version or shape is refused."""
    raw = read_json(path)
    version = raw.get("schema_version")
    if version != 1:
        raise UsageError(
            f"{path} has schema_version {version!r}; this glmplan reads 1.",
            "Save the plan again with glmplan size --save.",
        )
    try:
        return Plan.model_validate(raw)
    except ValidationError as error:
        raise UsageError(
            f"{path} is not a glmplan plan: {first_problem(error)}.", "Save it again with glmplan size --save."
        ) from None
