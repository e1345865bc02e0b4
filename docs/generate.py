"""Write the pages of docs/reference/ from the code itself; a test compares them, so they cannot rot.

./dev docs            writes the pages
tests/docs            fails where a page differs from what this module would write
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "moorline"
REFERENCE = ROOT / "docs" / "reference"
KINDS = ("Malformed", "NotAuthentic", "Refused", "Conflict", "Unavailable", "Misconfigured")
SPECIAL = {"Undone": "Unavailable", "super().__init__": "NotAuthentic"}
"""What else makes an error: a kind's own kind, and the constructor of one that carries evidence (ledger Attack)."""
ROLES = ("hsm", "svc", "device", "host", "orchestrator", "verifier", "launcher", "operator", "authority")
METHODS = ("get", "post", "put", "delete")
SETTINGS = """# Settings

One TOML file a service; unknown keys are refused with the nearest known name. Paths are relative to the file.
`moor init` writes these files, with the same words as comments.

A variable `MOOR_<SERVICE>_<KEY>` of the environment takes the place of a key, such as `MOOR_BROKER_LISTEN_HTTPS`, or,
for a key of a table, `MOOR_HOST_ATTESTATION_PERIOD_S`: text and paths as they are, everything else as TOML writes it.
An unknown one is refused with the nearest known name. No setting is a secret: secrets are in files (0600) that settings
name.
"""
HEAD = "<!-- Written by ./dev docs from the code; edit the code, not this page. -->\n\n"


def pages() -> dict[str, str]:
    """Every generated page by file name."""
    return {name: write() for name, write in writers().items()}


def writers() -> dict[str, Callable[[], str]]:
    """What writes each generated page, by file name; some take seconds."""
    return {
        "codes.md": codes,
        "endpoints.md": endpoints,
        "settings.md": settings,
        "metrics.md": metrics,
        "cli.md": command_line,
        "rules.md": rules,
        "sec009-status.md": partial(beside, "sec009"),
    }


def codes() -> str:
    """All error and finding codes, with the kind of error, the words and the module that raises it."""
    rows: dict[str, set[tuple[str, str]]] = {}
    words: dict[str, str] = {}
    for path, tree in modules():
        for code in _tabled(tree) if path.parent.name == "policy" else ():
            rows.setdefault(code, set()).add(("finding", room(path)))
            words.setdefault(code, "by the table of the module")
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            found = _error(call) or _finding(call)
            if found is not None:
                code, kind, says = found
                rows.setdefault(code, set()).add((kind, room(path)))
                words.setdefault(code, says)
    for code, place in demanded():
        rows.setdefault(code, set()).add(("finding", place))
        words.setdefault(code, "the policy's demand on this field")
    lines = ["| code | kind | says | raised in |", "|---|---|---|---|"]
    for code in sorted(rows):
        kinds = ", ".join(sorted({kind for kind, _ in rows[code]}))
        places = ", ".join(sorted({f"`{place}`" for _, place in rows[code]}))
        lines.append(f"| `{code}` | {kinds} | {words[code]} | {places} |")
    intro = (
        "# Codes\n\nEvery refusal carries one of these. The kind decides HTTP status and exit code: Malformed 400/2, "
        "NotAuthentic 401/1,\nRefused 403/1, Conflict 409/1, Unavailable 503/2, Misconfigured 500/2; "
        "`finding` is a row of a verdict.\n\n"
    )
    return HEAD + intro + "\n".join(lines) + "\n"


def endpoints() -> str:
    """All HTTP routes with who may call them."""
    rows = []
    for path, tree in modules("services"):
        names = _module_names(tree)
        for function in (node for node in ast.walk(tree) if isinstance(node, ast.AsyncFunctionDef | ast.FunctionDef)):
            for decorator in function.decorator_list:
                route = _route(decorator, names)
                if route is not None:
                    callers = _callers(function, path.stem, names)
                    says = ((ast.get_docstring(function) or "").strip().splitlines() or [""])[0]
                    rows.append(f"| `{path.stem}` | {route[0].upper()} | `{route[1]}` | {callers} | {says} |")
    head = ["| module | method | path | callers | what |", "|---|---|---|---|---|"]
    intro = (
        "# Endpoints\n\nRoutes by the module that defines them; those of `http` are on every service. Callers are roles of "
        "the service's own\ntrust domain, shown by client certificate; `anybody` is so on purpose: what is said or asked "
        "there proves itself or is public.\n\n"
    )
    return HEAD + intro + "\n".join([*head, *sorted(rows)]) + "\n"


def settings() -> str:
    """All keys of all TOML files, from the frozen dataclasses that load them."""
    parts = [SETTINGS]
    for path, tree in modules("services", "cli"):
        for cls in (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name.endswith("Settings")):
            parts.append(f"\n## `{path.stem}`: {cls.name}\n\n{(ast.get_docstring(cls) or '').strip()}\n")
            parts.append("\n| key | type | default | what it is for |\n|---|---|---|---|")
            for field, after in zip(cls.body, [*cls.body[1:], None], strict=True):
                if not isinstance(field, ast.AnnAssign):
                    continue
                default = "required" if field.value is None else f"`{ast.unparse(field.value)}`"
                kind = ast.unparse(field.annotation).replace("|", "or")
                says = " ".join((_text(after.value) or "").split()) if isinstance(after, ast.Expr) else ""
                parts.append(f"\n| `{ast.unparse(field.target)}` | `{kind}` | {default} | {says} |")
            parts.append("\n")
    return HEAD + "".join(parts)


def metrics() -> str:
    """All metrics of all services, from the calls that make them."""
    rows = []
    for path, tree in modules("services"):
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            name = getattr(call.func, "id", None)
            texts = [text for text in map(_text, call.args) if text is not None]
            if name not in ("measured", "Counter", "Gauge") or len(texts) < 2 or not texts[0].startswith("moorline_"):
                continue
            labels = [
                text
                for node in (*call.args[2:], *(keyword.value for keyword in call.keywords if keyword.arg == "labels"))
                if isinstance(node, ast.List | ast.Tuple)
                for text in map(_text, node.elts)
                if text is not None
            ]
            kind = "counter" if name == "Counter" else "gauge"
            full = texts[0] + ("_total" if kind == "counter" else "")
            rows.append(f"| `{full}` | {kind} | {', '.join(labels) or '-'} | {texts[1]} | `{path.stem}` |")
    intro = (
        "# Metrics\n\nServices with an HTTP interface answer `/metrics` (Prometheus text) and `/healthz` there; a broker "
        "shows its own on its admin\nsocket, a host agent and a launcher on the unix socket `status_socket` names. Whoever "
        "reaches a port may read them: they are counts,\nwithout names of hosts, devices or functions.\n\n"
    )
    head = ["| metric | kind | labels | what | module |", "|---|---|---|---|---|"]
    return HEAD + intro + "\n".join([*head, *sorted(rows)]) + "\n"


def command_line() -> str:
    """`--help` of `moor` and of every noun and verb."""
    from moorline.cli import NOUNS

    asked: list[list[str]] = [[]]
    for noun in NOUNS:
        asked += [[noun], *([noun, verb] for verb in _verbs(noun))]
    return HEAD + "\n".join(["# Command line\n", *_helps(asked)])


def demanded() -> Iterator[tuple[str, str]]:
    """The codes of findings that are made of a policy's field, and the module of the policy."""
    from moorline.policy import language

    for family in language.FAMILIES:
        for path in (*language.value_types(family), "platform.advisories"):
            if path.startswith("platform."):
                yield "intel." + path.removeprefix("platform."), "policy.intel"
            elif "." not in path:
                yield f"{family}.{path}", f"policy.{family}"


def rules() -> str:
    """What a verifier must not get wrong, and where each is shown (docs/rules.py)."""
    return beside("rules")


def beside(name: str) -> str:
    """The page that a module beside this one makes."""
    from importlib import util

    spec = util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page: str = module.page(HEAD)
    return page


def modules(*rooms: str) -> Iterator[tuple[Path, ast.Module]]:
    """Every module of the package (or of some rooms) with its syntax tree, in a fixed order."""
    for path in sorted(SOURCE.rglob("*.py")):
        inside = path.relative_to(SOURCE)
        if "versions" not in inside.parts and (not rooms or inside.parts[0] in rooms):
            yield path, ast.parse(path.read_text("utf-8"))


def room(path: Path) -> str:
    """The module's dotted name below the package."""
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts)


def _error(call: ast.Call) -> tuple[str, str, str] | None:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", None)
    name = SPECIAL.get(ast.unparse(call.func), name)
    if name not in KINDS or not call.args:
        return None
    code = _text(call.args[0])
    return None if code is None or "." not in code else (code, name, _text(call.args[1]) or "" if len(call.args) > 1 else "")


def _finding(call: ast.Call) -> tuple[str, str, str] | None:
    if getattr(call.func, "id", getattr(call.func, "attr", None)) != "Finding":
        return None
    words = {keyword.arg: _text(keyword.value) for keyword in call.keywords}
    code = words.get("code")
    return None if code is None else (code, "finding", words.get("says") or "")


def _tabled(tree: ast.Module) -> Iterator[str]:
    """The codes in a policy's table `_CODES`, whose findings take them from there."""
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", None) == "_CODES" and node.value is not None:
            texts = (_text(one) for one in ast.walk(node.value) if isinstance(one, ast.Constant))
            yield from (text for text in texts if text and "." in text)


def _text(node: ast.expr) -> str | None:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value.replace("|", "\\|")
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values).replace("|", "\\|")
    return None


def _module_names(tree: ast.Module) -> dict[str, str]:
    """Text constants of a module, and for other names the roles that stand behind them."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if isinstance(target, ast.Name):
                names[target.id] = _text(node.value) or " ".join(_roles(node.value))
        elif isinstance(node, ast.FunctionDef):
            names[node.name] = " ".join(_required(node, names))
    return names


def _roles(node: ast.AST) -> list[str]:
    return sorted(
        {
            one.attr.lower()
            for one in ast.walk(node)
            if isinstance(one, ast.Attribute) and isinstance(one.value, ast.Name) and one.value.id == "Role"
        }
    )


def _route(decorator: ast.expr, names: dict[str, str]) -> tuple[str, str] | None:
    if not (isinstance(decorator, ast.Call) and isinstance(decorator.func, ast.Attribute) and decorator.args):
        return None
    argument = decorator.args[0]
    if isinstance(argument, ast.JoinedStr):
        path = "".join(
            names.get(part.value.id, "")
            if isinstance(part, ast.FormattedValue) and isinstance(part.value, ast.Name)
            else str(getattr(part, "value", ""))
            for part in argument.values
        )
    else:
        path = _text(argument) or ""
    return (decorator.func.attr, path) if decorator.func.attr in METHODS and path.startswith("/") else None


def _callers(function: ast.AsyncFunctionDef | ast.FunctionDef, module: str, names: dict[str, str]) -> str:
    if module.startswith("broker_admin"):
        return "owner of the admin socket"
    called = {node.func.id for node in ast.walk(function) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    roles = {role for name in called for role in names.get(name, "").split() if role in ROLES}
    return ", ".join(sorted(roles | set(_required(function, names)))) or "anybody"


def _required(function: ast.AST, names: dict[str, str]) -> list[str]:
    """The roles that calls of `require` in a function name, directly or by a constant."""
    calls = [
        node
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and "require" in (getattr(node.func, "attr", None), getattr(node.func, "id", None))
    ]
    constants = {node.id for call in calls for node in ast.walk(call) if isinstance(node, ast.Name)}
    return [role for call in calls for role in _roles(call)] + [
        role for name in constants for role in names.get(name, "").split()
    ]


def _helps(asked: list[list[str]]) -> list[str]:
    """The help of each command, from one process that has the libraries loaded and forks for each."""
    said = subprocess.run(
        [sys.executable, "-c", _EACH_HELP],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=True,
        env={"COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1", "PATH": "/usr/bin:/bin", "HOME": "/nonexistent"},
    ).stdout
    return [_section(words, text) for words, text in zip(asked, json.loads(said), strict=True)]


_EACH_HELP = """
import json, os, sys, tempfile
import rich.console, rich.markdown, rich.panel, rich.table, typer.rich_utils
import moorline.cli
texts = []
for words in json.load(sys.stdin):
    with tempfile.TemporaryFile("w+") as out:
        if (child := os.fork()) == 0:
            os.dup2(out.fileno(), 1)
            sys.argv = ["moor", *words, "--help"]
            moorline.cli.main()
        os.waitpid(child, 0)
        out.seek(0)
        texts.append(out.read())
print(json.dumps(texts))
"""


def _section(words: list[str], text: str) -> str:
    body = "\n".join(line.rstrip() for line in text.strip().splitlines())
    return f"\n## `moor {' '.join(words)}`".replace(" `", "`") + f"\n\n```text\n{body}\n```\n"


def _verbs(noun: str) -> list[str]:
    import importlib

    import typer

    command = typer.main.get_command(importlib.import_module(f"moorline.cli.{noun.replace('-', '_')}").app)
    return list(getattr(command, "commands", {}))


if __name__ == "__main__":
    REFERENCE.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (REFERENCE / name).write_text(text, "utf-8")
        print(f"wrote docs/reference/{name}")
