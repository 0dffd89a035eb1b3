"""The code that travels with a standalone checkpoint: the package's own modules, joined to one file.

What belongs into it is found by following imports from [`parscale_adapt.models.streamed`], so that nothing is ever
written twice. Definitions are copied as they stand; all modules share one namespace, in which every name must be unique.
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
_VERSIONS = "version"  # needs no import, and stands before those that another version of transformers may lack
_GUARDED = "transformers"
_LINE_LENGTH = 119

_HEADER = '''\
"""{stock_causal_lm} in parallel streams (ParScale, arXiv 2505.10475), in one file for torch and transformers alone.

Load it with `AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)`.

Written by parscale_adapt {version}, whose modules it joins: {modules}.
"""
# SPDX-License-Identifier: Apache-2.0
'''

_GUARDED_IMPORTS = """\
try:
{imports}
except ImportError as error:
    raise ImportError(
        f"The code of this checkpoint needs transformers {{TESTED_TRANSFORMERS}}, got {{transformers.__version__}}, which "
        f"lacks what it imports ({{error}}): install a version in that range."
    ) from error

if not is_tested(transformers.__version__):
    warnings.warn(
        f"The code of this checkpoint was tested with transformers {{TESTED_TRANSFORMERS}}, got "
        f"{{transformers.__version__}}: if it fails, install a version in that range.",
        stacklevel=2,
    )
"""

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


@dataclass(frozen=True)
class _Module:
    """A module of the package; `name` is its dotted path in it."""

    name: str
    source: str

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.source)

    @property
    def stem(self) -> str:
        return self.name.rpartition(".")[2]


@dataclass(frozen=True, order=True)
class _Import:
    """`import module`, or `from module import name`; both as they are written, `name` perhaps with `as`."""

    module: str
    name: str = ""

    @property
    def package(self) -> str:
        return self.module.partition(".")[0]

    @property
    def bound_name(self) -> str:
        return (self.name or self.package).rpartition(" as ")[2]


def joined_code(names: ClassNames, sources: Mapping[str, str], version: str) -> str:
    """The text of `modeling_parscale.py`.

    Args:
        names: of the classes at its end.
        sources: module and name there of the three stock classes, such as
            `{"Qwen2Model": "transformers.models.qwen2.modeling_qwen2"}`.
        version: of this package.

    Raises:
        ValueError: two modules of the package give one name to different things, or import what can't be joined.
    """
    modules = _modules_in_order()
    imports = {module.name: set(_outside_imports(module)) for module in modules}
    imports["this checkpoint"] = {_Import(module, name) for name, module in sources.items()}
    imports["this check of versions"] = {_Import("transformers"), _Import("warnings")}
    _refuse_ambiguous_names(modules, imports)
    needed = set().union(*imports.values())
    guarded = {item for item in needed if item.package == _GUARDED and item.name}
    header = _HEADER.format(
        version=version,
        stock_causal_lm=names.stock_causal_lm,
        modules=", ".join(module.stem for module in modules),
    )
    header = "\n".join(textwrap.fill(line, _LINE_LENGTH) for line in header.splitlines())
    versions, *others = (f"{_section(module)}\n\n\n{_without_imports(module)}" for module in modules)
    parts = [
        f"{header}\n\n{_import_lines(needed - guarded)}",
        versions,
        _GUARDED_IMPORTS.format(imports=textwrap.indent(_import_lines(guarded, _LINE_LENGTH - 4), "    ")),
        *others,
        f"{_rule('this checkpoint')}\n\n\n{_CLASSES.format(**vars(names))}",
    ]
    return "\n\n\n".join(part.strip("\n") for part in parts) + "\n"


def _modules_in_order() -> list[_Module]:
    """Every module that the entry needs, each after those that it imports.

    Raises:
        ValueError: two of them have the same last name, which is what a joined file calls them by.
    """
    found: dict[str, _Module] = {}

    def add(name: str) -> None:
        if name in found:
            return
        module = _Module(name, _PACKAGE.joinpath(*name.split(".")).with_suffix(".py").read_text(encoding="utf-8"))
        for node in module.tree.body:
            if isinstance(node, ast.ImportFrom) and node.level and node.module:
                add(_imported_module(name, node))
        if module.stem in (other.stem for other in found.values()):
            raise ValueError(f"Two modules that are joined are named {module.stem!r}: rename one of them.")
        found[name] = module

    add(_VERSIONS)
    add(_ENTRY)
    return list(found.values())


def _imported_module(module: str, node: ast.ImportFrom) -> str:
    """The dotted path, from the package on, of what a relative import in `module` names."""
    folders = module.split(".")[: -node.level]
    return ".".join([*folders, node.module or ""])


def _outside_imports(module: _Module) -> Iterator[_Import]:
    """Imports from outside the package at the top of a module. Those inside functions stay where they are.

    Raises:
        ValueError: it imports what can't be joined.
    """
    tree = module.tree
    inside_functions = {
        node
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        level, source = (node.level, node.module) if isinstance(node, ast.ImportFrom) else (0, None)
        is_local = node in inside_functions
        is_plain = source is not None and not any(alias.asname for alias in node.names)
        if (level and (is_local or not is_plain)) or not (is_local or node in tree.body):
            raise ValueError(
                f"{module.stem}.py, line {node.lineno}: an import that can't be joined to one file; import plain names of "
                "a module of the package at the top, and others there or inside functions."
            )
        if level == 0 and not is_local:
            for alias in node.names:
                yield _Import(ast.unparse(alias)) if source is None else _Import(source, ast.unparse(alias))


def _refuse_ambiguous_names(modules: list[_Module], imports: Mapping[str, set[_Import]]) -> None:
    """Check that every name at the top of the joined file means one thing.

    Raises:
        ValueError: two modules define it, one defines what another imports, or they import it from different places.
    """
    meanings: dict[str, dict[object, str]] = {}
    for module in modules:
        for name in _defined_names(module.tree):
            meanings.setdefault(name, {})[module.name] = module.stem
    for place, found in imports.items():
        for item in found:
            meanings.setdefault(item.bound_name, {})[item if item.name else item.package] = place.rpartition(".")[2]
    for name, places in meanings.items():
        if len(places) > 1:
            where = " and ".join(sorted(places.values()))
            raise ValueError(
                f"`{name}` means different things in {where}: names must be unique among modules that are joined, so "
                "rename one."
            )


def _defined_names(tree: ast.Module) -> set[str]:
    names = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def _without_imports(module: _Module) -> str:
    """The source of a module as it was written, without its docstring and imports at the top."""
    lines = module.source.splitlines()
    for index, node in enumerate(module.tree.body):
        is_docstring = index == 0 and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if is_docstring or isinstance(node, ast.Import | ast.ImportFrom):
            lines[node.lineno - 1 : node.end_lineno] = [""] * ((node.end_lineno or node.lineno) - node.lineno + 1)
    return re.sub(r"\n{4,}", "\n\n\n", "\n".join(lines)).strip("\n")


def _section(module: _Module) -> str:
    """A module's name and docstring as comments."""
    docstring = ast.get_docstring(module.tree) or ""
    return "\n".join([_rule(module.stem), "#", *(f"# {line}".rstrip() for line in docstring.splitlines())])


def _rule(name: str) -> str:
    return f"# --- {name} ".ljust(_LINE_LENGTH, "-")


def _import_lines(imports: set[_Import], line_length: int = _LINE_LENGTH) -> str:
    """Import statements, those of the standard library first."""
    names: dict[str, list[str]] = {}
    for item in sorted(imports):
        if item.name:
            names.setdefault(item.module, []).append(item.name)
    statements = [(item.package, f"import {item.module}") for item in sorted(imports) if not item.name]
    for module in names:
        statements.append((module.partition(".")[0], _import_statement(module, names[module], line_length)))
    blocks = [
        "\n".join(text for package, text in statements if (package in sys.stdlib_module_names) is is_standard)
        for is_standard in (True, False)
    ]
    return "\n\n".join(filter(None, blocks))


def _import_statement(module: str, names: list[str], line_length: int) -> str:
    statement = f"from {module} import {', '.join(names)}"
    if len(statement) <= line_length:
        return statement
    return "\n".join([f"from {module} import (", *(f"    {name}," for name in names), ")"])
