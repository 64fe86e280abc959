"""Chat templates of a published checkpoint, as data: from a JSON file, or from string literals in its own code.

The code is parsed with `ast` and never executed.
"""

import ast
import json
import re
import warnings
from collections.abc import Iterator

from modeling_clara.configuration_clara import DEFAULT_PROMPTS, PROMPT_KINDS, CLaRaConfig


_ASSISTANTS = {kind: DEFAULT_PROMPTS[kind]["assistant"] for kind in PROMPT_KINDS}
# A remark for the reader at the end of a template, set apart by white space.
_REMARK = re.compile(r"\s{2,}\([^()]*\)$")


def prompts_from_file(path: str) -> dict[str, dict]:
    """Templates by kind (`answer`, `qa`, `paraphrase`) from a JSON file, as the configuration's `prompts` holds them.

    A kind's `user` may be called anything that starts with `user`; `assistant` may be left out. Kinds may be missing.

    Raises:
        ValueError: the file cannot be read, or holds no template.
    """
    try:
        with open(path, encoding="utf-8") as file:
            values = json.load(file)
        prompts = {kind: _prompt_entry(kind, values[kind]) for kind in PROMPT_KINDS if kind in values}
        CLaRaConfig._complete_prompts(prompts)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is no file of prompts: {error}") from error
    if not prompts:
        raise ValueError(f"{path} is no file of prompts: it has none of {', '.join(PROMPT_KINDS)}.")
    return prompts


def _prompt_entry(kind: str, entry: dict) -> dict:
    users = [value for key, value in entry.items() if key.startswith("user")]
    if len(users) != 1:
        raise ValueError(f"{kind} needs one user template, or one list of them, got {len(users)}.")
    assistant = _REMARK.sub("", entry.get("assistant", _ASSISTANTS[kind]))
    return {"system": entry.get("system"), "user": users[0], "assistant": assistant}


def prompts_from_code(path: str) -> dict[str, dict]:
    """Templates by kind from the string literals of a published checkpoint's own `modeling_clara.py`.

    In a function that sends a text in the system role, or names a variable after it, the user's text is the literal
    with a place for documents. With a place for a question too, the pair is `answer`; where the function draws from a
    list of such literals, `paraphrase`; else `qa`.

    Returns:
        The kinds that were found; a kind that the code writes in several ways is left out.

    Raises:
        ValueError: the file is no Python.
    """
    with open(path, encoding="utf-8") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        try:
            tree = ast.parse(file.read())
        except (SyntaxError, ValueError) as error:
            raise ValueError(f"{path} is no Python: {error}") from error
    lists = dict(_template_lists(tree))
    texts = dict(_assigned_texts(tree.body))
    found = {kind: [] for kind in PROMPT_KINDS}
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for kind, prompt in _prompts_of(node, lists, texts):
                if prompt not in found[kind]:
                    found[kind].append(prompt)
    return {kind: prompts[0] for kind, prompts in found.items() if len(prompts) == 1}


def _prompts_of(function: ast.FunctionDef, lists: dict, texts: dict) -> Iterator[tuple[str, dict]]:
    texts = {**texts, **dict(_assigned_texts(ast.walk(function)))}
    literals = [text for node in _expressions(function) if (text := _template(node))]
    system = _system_text(function, texts)
    if system is None:
        return
    assistants = [text for text in literals if "{question}" in text and "{answer}" in text and "{docs}" not in text]
    names = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
    drawn = [users for name, users in lists.items() if name in names]
    users = [text for text in literals if "{docs}" in text and not any(text in known for known in drawn)]
    for user in dict.fromkeys(users):
        kind = "answer" if "{question}" in user else "qa"
        assistant = assistants[0] if assistants and kind == "qa" else _ASSISTANTS[kind]
        yield kind, {"system": system, "user": user, "assistant": assistant}
    for users in drawn:
        yield "paraphrase", {"system": system, "user": users, "assistant": _ASSISTANTS["paraphrase"]}


def _template_lists(tree: ast.AST) -> Iterator[tuple[str, list[str]]]:
    """Names and contents of the lists of literals that all have a place for documents."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, (ast.List, ast.Tuple)):
            users = [_template(element) for element in node.value.elts]
            if users and all(user and "{docs}" in user for user in users):
                for target in node.targets:
                    if isinstance(target, ast.Name):
                        yield target.id, users


def _assigned_texts(nodes) -> Iterator[tuple[str, str]]:
    for node in nodes:
        if isinstance(node, ast.Assign) and (text := _template(node.value)):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    yield target.id, text


def _system_text(function: ast.FunctionDef, texts: dict[str, str]) -> str | None:
    """What the function sends in the system role: by name or literal in a message, or in a variable named after it."""
    for node in ast.walk(function):
        if isinstance(node, ast.Dict):
            entries = {key.value: value for key, value in zip(node.keys, node.values, strict=True) if _is_text(key)}
            if _is_text(entries.get("role")) and entries["role"].value == "system" and "content" in entries:
                content = entries["content"]
                text = texts.get(content.id) if isinstance(content, ast.Name) else _template(content)
                if text:
                    return text
    return next((text for name, text in texts.items() if "system" in name.lower() and "{" not in text), None)


def _expressions(function: ast.FunctionDef) -> Iterator[ast.expr]:
    """The function's expressions in the order of the source, without the parts of literals, docstrings and errors."""
    stack = list(reversed(function.body))
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Raise) or (isinstance(node, ast.Expr) and _is_text(node.value)):
            continue
        if isinstance(node, ast.expr):
            yield node
            if _template(node) is not None:
                continue
        stack.extend(reversed(list(ast.iter_child_nodes(node))))


def _is_text(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _template(node: ast.AST) -> str | None:
    """A literal as a template: `{docs}`, `{question}` and `{answer}` for the variables in it; `None` for all else."""
    if _is_text(node):
        return node.value
    if isinstance(node, ast.JoinedStr):
        parts = [_template(part) if _is_text(part) else _field(getattr(part, "value", None)) for part in node.values]
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        parts = [_template(side) or _field(side) for side in (node.left, node.right)]
    else:
        return None
    return None if None in parts else "".join(parts)


def _field(node: ast.AST | None) -> str | None:
    """The place that a variable fills, by its name."""
    if not isinstance(node, ast.Name):
        return None
    name = node.id.lower()
    for start, field in (("doc", "{docs}"), ("q", "{question}"), ("a", "{answer}")):
        if name.startswith(start):
            return field
    return None
