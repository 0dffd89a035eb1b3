"""The code that travels with a standalone checkpoint: the package's own modules, joined to one file.

What belongs into it is found by following imports from `modeling.py`, so that nothing is ever written twice.
"""

import ast
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path


CODE_FILE = "modeling_parscale.py"
_PACKAGE = Path(__file__).parents[1]
_ENTRY = "models.streamed"
_LINE_LENGTH = 119
# Attention functions are registered for the whole process. Named after their file, they leave checkpoints of other
# versions, and the package itself, alone.
_REPLACED = {"config_view": ('STREAMS = "parscale_"', 'STREAMS = f"{__name__}."')}

_HEADER = '''\
"""{stock_causal_lm} in parallel streams (ParScale, arXiv 2505.10475), in one file for torch and transformers alone.

Load it with `AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)`.

Written by parscale_adapt {version}, whose modules it joins: {modules}.
"""
# SPDX-License-Identifier: Apache-2.0
'''

_CLASSES = '''\
class {config}({stock_config}):
    """The configuration of {stock_causal_lm} and `parscale`, which says how the streams are laid out."""

    model_type = "{model_type}"


class {model}(StreamedModel, {stock_model}):
    """{stock_model} in parallel streams; `last_hidden_state` is the aggregated one."""

    config_class = {config}


class {causal_lm}(StreamedCausalLM, {stock_causal_lm}):
    """The LM head over [`{model}`]."""

    config_class = {config}
    streamed_class = {model}


inherit_weight_names({config}, {model}, {causal_lm})
'''


@dataclass(frozen=True)
class ClassNames:
    """Names of the classes of a checkpoint, and of those of transformers that they derive from."""

    model_type: str
    config: str
    model: str
    causal_lm: str
    stock_config: str
    stock_model: str
    stock_causal_lm: str


def joined_code(names: ClassNames, sources: Mapping[str, str], version: str) -> str:
    """The text of `modeling_parscale.py`.

    Args:
        names: of the classes at its end.
        sources: module and name there of the three stock classes, such as
            `{"Qwen2Model": "transformers.models.qwen2.modeling_qwen2"}`.
        version: of this package.

    Raises:
        ValueError: two modules of the package define the same public name, or import what can't be joined.
    """
    modules = {_stem(module): (source, ast.parse(source)) for module, source in _modules_in_order().items()}
    renamed = _clashing_private_names({name: tree for name, (_, tree) in modules.items()})
    imports: dict[str, set[str]] = {}
    bodies = []
    for name, (source, tree) in modules.items():
        for module, imported in _absolute_imports(name, tree):
            imports.setdefault(module, set()).add(imported)
        body = _without_imports(_with_replacement(name, source), tree)
        for private in renamed.get(name, ()):
            body = re.sub(rf"\b{private}\b", f"_{name}{private}", body)
        bodies.append(f"{_section(name, tree)}\n\n\n{body}")
    for stock_name, module in sources.items():
        imports.setdefault(module, set()).add(stock_name)
    header = _HEADER.format(
        version=version,
        stock_causal_lm=names.stock_causal_lm,
        modules=", ".join(modules),
    )
    header = "\n".join(textwrap.fill(line, _LINE_LENGTH) for line in header.splitlines())
    classes = _CLASSES.format(**vars(names))
    parts = [f"{header}\n\n{_import_lines(imports)}", *bodies, f"{_rule('this checkpoint')}\n\n\n{classes}"]
    return "\n\n\n".join(part.strip("\n") for part in parts) + "\n"


def _modules_in_order() -> dict[str, str]:
    """Source of every module that the entry needs, each after those that it imports, by its dotted path in the package.

    Raises:
        ValueError: two of them have the same last name, which is what a joined file calls them by.
    """
    found: dict[str, str] = {}

    def add(module: str) -> None:
        if module in found:
            return
        source = _PACKAGE.joinpath(*module.split(".")).with_suffix(".py").read_text(encoding="utf-8")
        for node in ast.parse(source).body:
            if isinstance(node, ast.ImportFrom) and node.level and node.module:
                add(_imported_module(module, node))
        if _stem(module) in map(_stem, found):
            raise ValueError(f"Two modules that are joined are named {_stem(module)!r}: rename one of them.")
        found[module] = source

    add(_ENTRY)
    return found


def _imported_module(module: str, node: ast.ImportFrom) -> str:
    """The dotted path, from the package on, of what a relative import in `module` names."""
    folders = module.split(".")[: -node.level]
    return ".".join([*folders, node.module or ""])


def _stem(module: str) -> str:
    return module.rpartition(".")[2]


def _absolute_imports(module: str, tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Module and imported name of each import from outside the package; `("", statement)` for `import ...`."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        level, source = (node.level, node.module) if isinstance(node, ast.ImportFrom) else (0, None)
        is_renamed = any(alias.asname for alias in node.names)
        if node not in tree.body or (level and (is_renamed or source is None)):
            raise ValueError(
                f"{module}.py, line {node.lineno}: an import that can't be joined to one file; import plain names of a "
                "module of the package, at the top."
            )
        if source is None:
            yield "", ast.unparse(node)
        elif level == 0:
            yield from ((source, ast.unparse(alias)) for alias in node.names)


def _clashing_private_names(modules: Mapping[str, ast.Module]) -> dict[str, list[str]]:
    """Private names that several modules define, by module."""
    owners: dict[str, list[str]] = {}
    for module, tree in modules.items():
        for name in _defined_names(tree):
            owners.setdefault(name, []).append(module)
    clashes: dict[str, list[str]] = {}
    for name, where in owners.items():
        if len(where) > 1 and not name.startswith("_"):
            raise ValueError(
                f"`{name}` is defined in {' and '.join(where)}: modules that are joined need unique names."
            )
        for module in where if len(where) > 1 else ():
            clashes.setdefault(module, []).append(name)
    return clashes


def _defined_names(tree: ast.Module) -> set[str]:
    names = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def _without_imports(source: str, tree: ast.Module) -> str:
    """The source of a module as it was written, without its docstring and imports at the top."""
    lines = source.splitlines()
    for index, node in enumerate(tree.body):
        is_docstring = index == 0 and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if is_docstring or isinstance(node, ast.Import | ast.ImportFrom):
            lines[node.lineno - 1 : node.end_lineno] = [""] * ((node.end_lineno or node.lineno) - node.lineno + 1)
    return re.sub(r"\n{4,}", "\n\n\n", "\n".join(lines)).strip("\n")


def _with_replacement(name: str, source: str) -> str:
    if name not in _REPLACED:
        return source
    old, new = _REPLACED[name]
    if source.count(old) != 1:
        raise ValueError(f"{name}.py must hold `{old}` once, for its copy in checkpoints to get a name of its own.")
    return source.replace(old, new)


def _section(name: str, tree: ast.Module) -> str:
    """A module's name and docstring as comments."""
    docstring = ast.get_docstring(tree) or ""
    return "\n".join([_rule(name), "#", *(f"# {line}".rstrip() for line in docstring.splitlines())])


def _rule(name: str) -> str:
    return f"# --- {name} ".ljust(_LINE_LENGTH, "-")


def _import_statement(module: str, names: list[str]) -> str:
    statement = f"from {module} import {', '.join(names)}"
    if len(statement) <= _LINE_LENGTH:
        return statement
    return "\n".join([f"from {module} import (", *(f"    {name}," for name in names), ")"])


def _import_lines(imports: Mapping[str, set[str]]) -> str:
    """The imports of all modules, those of the standard library first."""
    lines = [(statement.split()[1].partition(".")[0], statement) for statement in imports.get("", ())]
    for module, names in imports.items():
        if module:
            lines.append((module.partition(".")[0], _import_statement(module, sorted(names))))
    blocks = [
        sorted(text for package, text in lines if (package in sys.stdlib_module_names) is is_standard)
        for is_standard in (True, False)
    ]
    return "\n\n".join("\n".join(sorted(block, key=lambda line: not line.startswith("import"))) for block in blocks)
