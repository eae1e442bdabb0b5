"""Which command-line flags do the released engine wheels accept?

Flags are read from the source inside the wheel with `ast`: nothing is imported, so neither torch nor a GPU is needed.
SGLang 0.5.13.post1 spells every flag in sglang/srt/server_args.py; 0.5.23 derives most of them from annotated fields,
sglang/srt/arg_groups/fields/*.py, by the rules of arg_groups/arg_utils.py `add_cli_args_from_dataclass`.
Left out: choices computed at run time (None), defaults, required flags and everything resolved after argparse.
"""

import ast
import fcntl
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

# Asked for when this Python or platform has no wheel of its own: the source inside is the same.
LINUX_WHEEL = ("--python-version=3.11", "--platform=manylinux_2_34_x86_64", "--platform=manylinux_2_28_x86_64")


class WheelUnavailable(RuntimeError):
    """The wheel is not in the cache and was not, or could not be, downloaded."""


class Unreadable(ValueError):
    """The expression has no value that can be read without running the program."""


@dataclass(frozen=True)
class Flag:
    """One argparse option of the server; `nargs` is argparse's, None where a flag takes exactly one value or none."""

    names: tuple[str, ...]
    choices: tuple[str, ...] | None
    type_name: str | None
    takes_value: bool
    nargs: str | None = None
    deprecated: bool = False


@dataclass(frozen=True)
class Scope:
    """The names one module, class or function binds, and where the other names are found."""

    module: str
    body: tuple[ast.stmt, ...]
    bound: Mapping[str, ast.AST]
    outer: "Scope | None" = None


def wheel(name: str, version: str) -> Path:
    """The released wheel, downloaded once into the cache folder."""
    folder = Path(os.environ.get("GLMPLAN_WHEEL_CACHE") or Path.home() / ".cache" / "glmplan-wheels")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if cached := sorted(folder.glob(pattern)):
        return cached[0]
    if name == "vllm" and os.environ.get("GLMPLAN_DOWNLOAD_VLLM") != "1":
        raise WheelUnavailable(f"{pattern} (336 MB) is not in {folder}; set GLMPLAN_DOWNLOAD_VLLM=1 to download it")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (cached := sorted(folder.glob(pattern))):
            cached = [_download(f"{name}=={version}", folder)]
    return cached[0]


def _download(requirement: str, folder: Path) -> Path:
    """Let pip fetch the wheel next to its final place and rename it, so that no reader sees half a file."""
    temporary = Path(tempfile.mkdtemp(dir=folder, prefix=".download-"))
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-q", "-d", str(temporary)]
    try:
        for extra in ((), LINUX_WHEEL):
            result = subprocess.run([*command, *extra, requirement], capture_output=True, text=True, check=False)
            if result.returncode == 0:
                (fetched,) = temporary.glob("*.whl")
                return fetched.rename(folder / fetched.name)
        raise WheelUnavailable(f"pip cannot download {requirement}: {result.stderr.strip()[-500:]}")
    finally:
        shutil.rmtree(temporary)


class Source:
    """The modules of one wheel, parsed on demand, and the literals that can be read from them."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive
        self._files = frozenset(archive.namelist())
        self._modules: dict[str, Scope] = {}

    def module(self, name: str) -> Scope:
        if name not in self._modules:
            stem = name.replace(".", "/")
            path = f"{stem}.py" if f"{stem}.py" in self._files else f"{stem}/__init__.py"
            if path not in self._files:
                raise Unreadable(f"{name} is not in the wheel")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in the engine's docstrings are not ours
                tree = ast.parse(self._archive.read(path))
            self._modules[name] = Scope(name, tuple(tree.body), _bindings(tree.body))
        return self._modules[name]

    def find(self, name: str, scope: Scope) -> tuple[ast.AST, Scope]:
        """The node a name is bound to, and the scope to read that node in; imports are followed."""
        at: Scope | None = scope
        while at is not None and name not in at.bound:
            at = at.outer
        if at is None:
            raise Unreadable(f"{name} is not bound in {scope.module}")
        node = at.bound[name]
        if isinstance(node, ast.ImportFrom):
            original = next(item.name for item in node.names if (item.asname or item.name) == name)
            return self.find(original, self.module(node.module or ""))
        return node, at

    def inside(self, node: ast.AST, scope: Scope) -> Scope:
        """The scope of a class or function body."""
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            return Scope(scope.module, tuple(node.body), _bindings(node.body), scope)
        raise Unreadable(f"{ast.dump(node)[:80]} in {scope.module} has no body")

    def member(self, owner: str, name: str, module: str) -> Scope:
        """The body of a class's method."""
        body = self.inside(*self.find(owner, self.module(module)))
        return self.inside(body.bound[name], body)

    def value(self, node: ast.AST, scope: Scope) -> object:
        """The literal an expression stands for; a set or the keys of a dict come as a list in source order."""
        match node:
            case ast.Constant(value=value):
                return value
            case ast.List(elts=parts) | ast.Tuple(elts=parts) | ast.Set(elts=parts):
                return [self.value(part, scope) for part in parts]
            case ast.Dict(keys=keys) if None not in keys:
                return [self.value(key, scope) for key in keys if key is not None]
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return [*self._items(left, scope), *self._items(right, scope)]
            case ast.Name(id=name):
                return self.value(*self.find(name, scope))
            case ast.Attribute(value=ast.Name(id=owner), attr=name):
                return self.value(*self.find(name, self.inside(*self.find(owner, scope))))
            case ast.Call(func=ast.Name(id="list" | "set" | "tuple" | "frozenset"), args=[part]):
                return self._items(part, scope)
            case ast.Call(func=ast.Attribute(value=owner, attr="keys"), args=[]):
                return self._items(owner, scope)
            case ast.Call(func=ast.Name(id=name), args=[], keywords=[]):
                return self._returned(*self.find(name, scope))
        raise Unreadable(f"{ast.dump(node)[:80]} in {scope.module}")

    def _items(self, node: ast.AST, scope: Scope) -> list[object]:
        value = self.value(node, scope)
        if not isinstance(value, list):
            raise Unreadable(f"{ast.dump(node)[:80]} in {scope.module} is not a list")
        return value

    def _returned(self, node: ast.AST, scope: Scope) -> object:
        """What a function without arguments answers when it gets to its last line."""
        body = self.inside(node, scope)
        if isinstance(last := body.body[-1], ast.Return) and last.value is not None:
            return self.value(last.value, body)
        raise Unreadable(f"the function at line {body.body[0].lineno} of {scope.module} does not end in return")


def _bindings(body: Sequence[ast.stmt]) -> dict[str, ast.AST]:
    """Names bound by the statements themselves; branches are not entered, and a class rebuilt from itself stays."""
    bound: dict[str, ast.AST] = {}
    for statement in body:
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                bound[name] = bound[name] if isinstance(bound.get(name), ast.ClassDef) else value
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                bound[name] = value
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name):
                bound[name] = statement
            case ast.ImportFrom(names=imported, level=0):
                bound.update({item.asname or item.name: statement for item in imported})
    return bound


@cache
def argument_definitions(path: Path) -> dict[str, Flag]:
    """The options of the SGLang server in this wheel, by every spelling."""
    with zipfile.ZipFile(path) as archive:
        source = Source(archive)
        server_args = source.module("sglang.srt.server_args")
        added = source.member("ServerArgs", "add_cli_args", server_args.module)
        flags = [_added_flag(source, call, added) for call in _add_argument_calls(added)]
        if "_INPUT_NAMESPACES" in server_args.bound:
            flags += _field_flags(source, server_args)
    return {name: flag for flag in flags for name in flag.names}


def _add_argument_calls(scope: Scope) -> Iterator[ast.Call]:
    for statement in scope.body:
        for node in ast.walk(statement):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument":
                yield node


def _added_flag(source: Source, call: ast.Call, scope: Scope) -> Flag:
    names = [str(source.value(argument, scope)) for argument in call.args]
    return _flag(source, scope, names, {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg})


def _flag(source: Source, scope: Scope, names: Sequence[str], keywords: Mapping[str, ast.AST]) -> Flag:
    """The flag argparse makes of these `add_argument` keywords."""
    action = ast.unparse(keywords["action"]) if "action" in keywords else "'store'"
    if action == "argparse.BooleanOptionalAction":
        names = [*names, *("--no-" + name.removeprefix("--") for name in names)]
    nargs = _literal(source, keywords.get("nargs") or _default_nargs(source, action, scope), scope)
    valueless = nargs == 0 or action in ("'store_true'", "'store_false'", "argparse.BooleanOptionalAction")
    choices = _literal(source, keywords.get("choices"), scope)
    described = _literal(source, keywords.get("help"), scope)
    return Flag(
        names=tuple(names),
        choices=tuple(str(choice) for choice in choices) if isinstance(choices, list) else None,
        type_name=ast.unparse(keywords["type"]) if "type" in keywords else None,
        takes_value=not valueless,
        nargs=nargs if isinstance(nargs, str) else None,
        deprecated=action.startswith("Deprecated") or bool(re.match(r"\W*deprecated\b", str(described), re.IGNORECASE)),
    )


def _literal(source: Source, node: ast.AST | None, scope: Scope) -> object:
    try:
        return None if node is None else source.value(node, scope)
    except Unreadable:
        return None


def _default_nargs(source: Source, action: str, scope: Scope) -> ast.AST | None:
    """The `nargs` an engine's own action class passes to argparse when the call names none."""
    if not action.isidentifier():
        return None
    body = source.inside(*source.find(action, scope))
    if not isinstance(init := body.bound.get("__init__"), ast.FunctionDef):
        return None
    named = [argument.arg for argument in init.args.args]
    return dict(zip(reversed(named), reversed(init.args.defaults), strict=False)).get("nargs")


def _field_flags(source: Source, server_args: Scope) -> Iterator[Flag]:
    """The flags that 0.5.23 derives from `name: A[type, "help"]` and `name: A[type, Arg(...)]`."""
    namespaces = server_args.bound["_INPUT_NAMESPACES"]
    for namespace in namespaces.elts if isinstance(namespaces, ast.List) else []:
        fields = source.inside(*source.find(ast.unparse(namespace), server_args))
        for field in fields.body:
            match field:
                case ast.AnnAssign(
                    target=ast.Name(id=name),
                    annotation=ast.Subscript(value=ast.Name(id="A"), slice=ast.Tuple(elts=[kind, meta, *_])),
                ) if (flag := _field_flag(source, fields, name, kind, meta)) is not None:
                    yield flag


def _field_flag(source: Source, scope: Scope, name: str, kind: ast.expr, meta: ast.expr) -> Flag | None:
    arg = meta.keywords if isinstance(meta, ast.Call) else [ast.keyword("help", meta)]
    options = {item.arg: item.value for item in arg if item.arg}
    if _literal(source, options.get("no_cli"), scope):
        return None
    spelled = _literal(source, options.get("cli_name"), scope) or "--" + name.replace("_", "-")
    aliases = _literal(source, options.get("aliases"), scope)
    passed = ("help", "action", "nargs", "choices")
    keywords: dict[str, ast.AST] = {key: value for key, value in options.items() if key in passed}
    if "action" in options:
        extra = options.get("action_kwargs")
        given = zip(extra.keys, extra.values, strict=True) if isinstance(extra, ast.Dict) else ()
        keywords |= {str(key.value): value for key, value in given if isinstance(key, ast.Constant)}
    else:
        keywords |= _type_keywords(kind, options)
    return _flag(source, scope, [str(spelled), *(aliases if isinstance(aliases, list) else [])], keywords)


def _type_keywords(kind: ast.expr, options: Mapping[str, ast.expr]) -> dict[str, ast.AST]:
    """The keywords `add_cli_args_from_dataclass` infers from a field's type."""
    kind = _without_none(kind)
    parser = options.get("type_parser")
    inferred: dict[str, ast.AST] = {}
    if isinstance(kind, ast.Name) and kind.id == "bool":
        return {"action": ast.Constant("store_true")}
    match kind:
        case ast.Subscript(value=ast.Name(id="Literal"), slice=values):
            literals = values.elts if isinstance(values, ast.Tuple) else [values]
            inferred["choices"] = options.get("choices") or ast.List(elts=literals)
            first = literals[0].value if isinstance(literals[0], ast.Constant) else ""
            kind = ast.Name(id=type(first).__name__)
        case ast.Subscript(value=ast.Name(id="List" | "list"), slice=element) if parser is None:
            inferred["nargs"] = options.get("nargs") or ast.Constant("+")
            kind = element
    plain = isinstance(kind, ast.Name) and kind.id in ("int", "float")
    return {"type": parser or (kind if plain else ast.Name(id="str")), **inferred}


def _without_none(kind: ast.expr) -> ast.expr:
    """X of `Optional[X]` or `X | None`; any other type as it is."""
    match kind:
        case ast.Subscript(value=ast.Name(id="Optional"), slice=inner):
            return inner
        case ast.BinOp(left=inner, op=ast.BitOr(), right=ast.Constant(value=None)):
            return inner
    return kind


def check_argv(argv: Sequence[str], flags: Mapping[str, Flag]) -> list[str]:
    """What argparse would refuse in the arguments after the program's name; empty when it accepts them."""
    problems = []
    position = 0
    while position < len(argv):
        argument = argv[position]
        position += 1
        if not _looks_like_flag(argument):
            problems.append(f"{argument}: unexpected argument")
            continue
        spelled, equals, inline = argument.partition("=")
        found = _spellings(spelled, flags)
        if len(found) != 1:
            could_be = f"ambiguous, could be {', '.join(found)}" if found else "unknown flag"
            problems.append(f"{spelled}: {could_be}")
        # The values of a flag that was not understood are skipped with it.
        flag = flags[found[0]] if len(found) == 1 else Flag((spelled,), None, None, takes_value=True, nargs="*")
        values = [inline] if equals else _values(argv[position:], flag)
        position += 0 if equals else len(values)
        problems += [f"{found[0] if found else spelled}: {problem}" for problem in _value_problems(values, flag)]
    return problems


def _looks_like_flag(argument: str) -> bool:
    """argparse's rule: a negative number or a text with a space is a value."""
    name = argument.partition("=")[0]
    return name.startswith("-") and " " not in name and not re.fullmatch(r"-|-\d+|-\d*\.\d+", name)


def _spellings(spelled: str, flags: Mapping[str, Flag]) -> list[str]:
    if spelled in flags:
        return [spelled]
    return sorted(name for name in flags if spelled.startswith("--") and name.startswith(spelled))


def _values(rest: Sequence[str], flag: Flag) -> list[str]:
    """The arguments argparse gives to the flag that stands before `rest`."""
    if not flag.takes_value:
        return []
    end = next((index for index, argument in enumerate(rest) if _looks_like_flag(argument)), len(rest))
    return list(rest[: end if flag.nargs in ("*", "+") else min(end, 1)])


def _value_problems(values: Sequence[str], flag: Flag) -> Iterator[str]:
    if not flag.takes_value:
        if values:
            yield f"takes no value, got {values[0]!r}"
        return
    if not values and flag.nargs not in ("*", "?"):
        yield "value missing"
    for value in values:
        if flag.type_name in ("int", "float") and not _is_number(value, whole=flag.type_name == "int"):
            yield f"{value!r} is not {'a whole' if flag.type_name == 'int' else 'a'} number"
        elif flag.choices is not None and value not in flag.choices:
            yield f"{value!r} is not one of {', '.join(flag.choices)}"


def _is_number(value: str, *, whole: bool) -> bool:
    try:
        int(value) if whole else float(value)
    except ValueError:
        return False
    return True


@cache
def vllm_flag_names(path: Path) -> set[str]:
    """The options of `vllm serve` in this wheel, with the `--no-`, `--enable-` and `--disable-` twins of booleans."""
    names: set[str] = set()
    with zipfile.ZipFile(path) as archive:
        source = Source(archive)
        engine, entry = "vllm.engine.arg_utils", "vllm.entrypoints.common.cli_args"
        serve = source.inside(*source.find("make_arg_parser", source.module(entry)))
        owners = [source.member(owner, "add_cli_args", engine) for owner in ("EngineArgs", "AsyncEngineArgs")]
        for scope in (serve, *owners):
            for call in _add_argument_calls(scope):
                spelled = [argument.value for argument in call.args if isinstance(argument, ast.Constant)]
                options = {name for name in spelled if isinstance(name, str) and name.startswith("-")}
                names |= options | (_twins(options) if _is_boolean_option(source, call, scope) else set())
        for name, kind in _config_fields(source, "FrontendArgs", source.module(entry)).items():
            option = "--" + name.replace("_", "-")
            names |= {option} | (_twins({option}) if _is_bool(kind) else set())
    return names


def _twins(options: set[str]) -> set[str]:
    """vllm/utils/argparse_utils.py `EnableDisableAction`."""
    long = {name for name in options if name.startswith("--")}
    opposite = {"--enable-": "--disable-", "--disable-": "--enable-"}
    swapped = {new + name.removeprefix(old) for name in long for old, new in opposite.items() if name.startswith(old)}
    return {"--no-" + name.removeprefix("--") for name in long} | swapped


def _is_boolean_option(source: Source, call: ast.Call, scope: Scope) -> bool:
    """`action=BooleanOptionalAction`, or `**kwargs["field"]` of `kwargs = get_kwargs(Config)`, the field a bool."""
    for node in ast.walk(call):
        match node:
            case ast.Attribute(attr="BooleanOptionalAction"):
                return True
            case ast.Subscript(value=ast.Name(id=table), slice=ast.Constant(value=field)) if table in scope.bound:
                match scope.bound[table]:
                    case ast.Call(func=ast.Name(id="get_kwargs"), args=[ast.Name(id=config)]):
                        return _is_bool(_config_fields(source, config, scope).get(str(field)))
    return False


def _config_fields(source: Source, name: str, scope: Scope) -> dict[str, ast.expr]:
    """The annotation of every field of a config class, inherited ones first."""
    node, where = source.find(name, scope)
    fields: dict[str, ast.expr] = {}
    if isinstance(node, ast.ClassDef):
        for base in node.bases:
            fields |= _config_fields(source, base.id, where) if isinstance(base, ast.Name) else {}
        own = [item for item in node.body if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)]
        fields |= {item.target.id: item.annotation for item in own if isinstance(item.target, ast.Name)}
    return fields


def _is_bool(kind: ast.expr | None) -> bool:
    """Whether vLLM's `_compute_kwargs` makes this type a flag without value; `bool | str | None` takes one."""
    members = set(ast.unparse(kind).split(" | ")) if kind is not None else set()
    return "bool" in members and members != {"bool", "str", "None"}
