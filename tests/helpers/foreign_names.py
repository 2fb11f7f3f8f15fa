"""Finds where a source patches objects of other packages, and uses names that they keep private."""

import ast
import functools
import inspect
import sys
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any

_OURS = ("megdet_d2", "megdet_cli", "train_net")
_BY_NAME = {"getattr", "setattr", "hasattr", "delattr"}


def find_patches(tree: ast.AST, namespace: dict[str, Any], own: Iterable[str]) -> set[str]:
    """Returns the attributes that a source sets on objects that it does not own.

    Those of ``self`` count where they hide a method of another package; private names never do.

    A name that is only known when the code runs is returned with its call:
    ``setattr(module, name)``.

    Args:
        tree: the source.
        namespace: the names of the module that the source is of.
        own: attributes that classes of this package have, see ``own_attributes``.
    """
    made_here = {node.name for node in ast.walk(tree) if isinstance(node, _DEFINITIONS)}
    made_here |= {name for node in getattr(tree, "body", []) for name in _assigned(node)}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, (ast.Store, ast.Del)):
            root = _root(node)
            is_config_key = node.attr.isupper()
            is_own = node.attr in own or root in made_here
            private = _is_private(node.attr)  # see find_private_names
            if root != "self" and root != "ctx" and not (is_config_key or is_own or private):
                found.add(node.attr)
        elif isinstance(node, ast.Call) and _is_set_by_name(node):
            target, name = node.args[:2]
            if not _is_self(target):
                constant = isinstance(name, ast.Constant)
                found.add(str(name.value) if constant else _call(node))
        elif _writes_to_dict(node):
            found.add(ast.unparse(node.value if isinstance(node, ast.Subscript) else node.func))
    return found | {
        name
        for cls, node in _classes(tree, namespace)
        for name in _self_attributes(node, ast.Store)
        if any(callable(getattr(base, name, None)) for base in _foreign_bases(cls))
    }


def find_private_names(tree: ast.AST, namespace: dict[str, Any]) -> set[str]:
    """Returns the names with one leading underscore of other packages that a source uses.

    Finds them on any object but ``self``; in imports; as constants of ``getattr`` and the like, and
    in tuples of strings; and on ``self`` where a base class of another package has the name.

    Args:
        tree: the source.
        namespace: the names of the module that the source is of.
    """
    own = {
        name
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for name in [*_self_attributes(node, ast.Store), *_class_attributes(node)]
    }
    standard = {name for name, value in namespace.items() if _is_standard(value)}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not _is_self(node.value):
            if _root(node) not in standard and node.attr not in own:
                found.add(node.attr)
        elif isinstance(node, ast.Call) and _name(node.func) in _BY_NAME and len(node.args) > 1:
            if isinstance(node.args[1], ast.Constant) and not _is_self(node.args[0]):
                found.add(str(node.args[1].value))
        elif isinstance(node, (ast.Tuple, ast.List, ast.Set)):
            found |= {str(each.value) for each in node.elts if isinstance(each, ast.Constant)}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            module = (node.module or "").split(".")
            if module[0] not in (*_OURS, *sys.stdlib_module_names):
                found |= {*module, *(alias.name for alias in node.names)}
        elif isinstance(node, ast.Import):
            modules = [alias.name.split(".") for alias in node.names]
            found |= {part for m in modules if m[0] not in sys.stdlib_module_names for part in m}
    for cls, node in _classes(tree, namespace):
        theirs = {name for base in _foreign_bases(cls) for name in _names_of(base)}
        used = {*_self_attributes(node, ast.Load, ast.Store), *_class_attributes(node)}
        found |= used & theirs
    return {name for name in found if _is_private(name) and not name.startswith("_megdet")}


def own_attributes(trees: Iterable[ast.AST]) -> set[str]:
    """Returns the data attributes that classes of these sources have, methods left out."""
    return {
        name
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for name in [*_self_attributes(node, ast.Store), *_class_attributes(node, methods=False)]
    }


_DEFINITIONS = (ast.FunctionDef, ast.ClassDef)


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def _is_self(node: ast.AST) -> bool:
    return _name(node) in ("self", "cls")


def _name(node: ast.AST) -> str | None:
    return node.id if isinstance(node, ast.Name) else None


def _root(node: ast.AST) -> str | None:
    """Returns the name before the first dot; "self" only for an attribute of ``self`` itself."""
    if isinstance(node, ast.Attribute) and _is_self(node.value):
        return "self"
    while isinstance(node, ast.Attribute):
        node = node.value
    return None if _is_self(node) else _name(node)


def _is_set_by_name(node: ast.Call) -> bool:
    return ast.unparse(node.func).split(".")[-1] in ("setattr", "delattr", "__setattr__") and (
        len(node.args) > 1
    )


def _call(node: ast.Call) -> str:
    return f"{ast.unparse(node.func)}({', '.join(map(ast.unparse, node.args[:2]))})"


def _writes_to_dict(node: ast.AST) -> bool:
    """Finds ``vars(x)[name] = ...``, ``x.__dict__[name] = ...``, ``x.__dict__.update(...)``."""
    if isinstance(node, ast.Subscript) and isinstance(node.ctx, (ast.Store, ast.Del)):
        return _is_dict_of(node.value)
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("update", "setdefault", "pop")
        and _is_dict_of(node.func.value)
    )


def _is_dict_of(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        return _name(node.func) == "vars" and not any(map(_is_self, node.args))
    return isinstance(node, ast.Attribute) and node.attr == "__dict__" and not _is_self(node.value)


def _assigned(node: ast.AST) -> list[str]:
    targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _self_attributes(node: ast.ClassDef, *contexts: type) -> list[str]:
    return [
        each.attr
        for each in ast.walk(node)
        if isinstance(each, ast.Attribute) and _is_self(each.value)
        if isinstance(each.ctx, contexts)
    ]


def _class_attributes(node: ast.ClassDef, methods: bool = True) -> list[str]:
    names = [name for each in node.body for name in _assigned(each)]
    for each in node.body:
        if isinstance(each, ast.FunctionDef):
            decorators = {ast.unparse(decorator) for decorator in each.decorator_list}
            if methods or f"{each.name}.setter" in decorators:
                names.append(each.name)
    return names


def _classes(tree: ast.AST, namespace: dict[str, Any]) -> Iterator[tuple[type, ast.ClassDef]]:
    for node in getattr(tree, "body", []):
        if isinstance(node, ast.ClassDef) and isinstance(namespace.get(node.name), type):
            yield namespace[node.name], node


def _foreign_bases(cls: type) -> list[type]:
    return [base for base in cls.__mro__[1:] if not _is_standard(base) and not _is_ours(base)]


def _is_ours(value: type) -> bool:
    return value.__module__.split(".")[0] in _OURS


def _is_standard(value: Any) -> bool:
    name = value.__name__ if inspect.ismodule(value) else getattr(value, "__module__", None)
    return str(name).split(".")[0] in sys.stdlib_module_names


@functools.cache
def _names_of(cls: type) -> frozenset[str]:
    """Returns the names that a class of another package defines or sets on itself."""
    try:
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    except (OSError, TypeError):  # not written in Python
        return frozenset(vars(cls))
    return frozenset([*_self_attributes(node, ast.Store), *_class_attributes(node)])
