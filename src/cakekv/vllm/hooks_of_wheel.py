"""Compare any release of vLLM with what the plug-in uses of it, by its source: nothing is imported, no GPU is needed.

`python -m cakekv.vllm.hooks_of_wheel WHEEL` says in a second what would have to change for a new release. It looks at
the methods in `hooks.HOOKS`, at every name that the plug-in imports, and at what a connector has to define.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from cakekv.errors import BadInput
from cakekv.vllm.hooks import HOOKS, VERSIONS, Methods, changes_in, is_tested

_CONNECTOR = "vllm.distributed.kv_transfer.kv_connector.v1.base", "KVConnectorBase_V1"


class Source:
    """The Python files of a vLLM.

    Parameters
    ----------
    path : Path
        A wheel, or a folder such as site-packages that holds `vllm/` and its dist-info.

    Raises
    ------
    BadInput
        There is no vLLM in it.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._root = path if path.is_dir() else zipfile.Path(path)
        except (OSError, zipfile.BadZipFile) as error:
            raise BadInput(f"{path} is neither a wheel nor a folder: {error}") from error
        if not (self._root / "vllm" / "__init__.py").exists():
            raise BadInput(f"{path} holds no vllm/__init__.py: name a wheel of vLLM, or the folder that vllm/ is in")
        abouts = [re.match(r"vllm(?:_cpu)?-(.+)\.dist-info", entry.name) for entry in self._root.iterdir()]
        self.version = next((about[1] for about in abouts if about), "unknown")
        self.module = cache(self._module)

    def _module(self, name: str) -> tuple[ast.Module, str] | None:
        """The parsed source of a module, and the package that it is in or is; None: there is none."""
        parts = name.split(".")
        for file, package in ((f"{parts[-1]}.py", parts[:-1]), (f"{parts[-1]}/__init__.py", parts)):
            path = self._root.joinpath(*parts[:-1], *file.split("/"))
            if path.is_file():
                return ast.parse(path.read_text(encoding="utf-8")), ".".join(package)
        return None

    def find(self, module: str, name: str) -> tuple[str, ast.AST] | None:
        """What defines a name that can be had from a module, and the module where it does."""
        parsed = self.module(module)
        if parsed is None:
            return None
        tree, package = parsed
        for node in _statements(tree.body):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name:
                return module, node
            if isinstance(node, ast.ImportFrom):
                names = package.split(".")
                base = names[: len(names) - node.level + 1] if node.level else []
                origin = ".".join([*base, *filter(None, [node.module])])
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return self.find(origin, alias.name) or (module, node)
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                return module, node
        return None

    def lineage(self, module: str, class_name: str) -> Iterator[ast.ClassDef]:
        """A class and its bases, as far as they are vLLM's."""
        found = self.find(module, class_name)
        if found is None or not isinstance(found[1], ast.ClassDef):
            return
        home, node = found[0], found[1]
        yield node
        for base in node.bases:
            name = base.value if isinstance(base, ast.Subscript) else base
            if isinstance(name, ast.Name):
                yield from self.lineage(home, name.id)

    def methods(self, module: str, class_name: str) -> Methods | None:
        """As `changes_in` wants them."""
        classes = list(self.lineage(module, class_name))

        def parameters(name: str) -> str | None:
            for node in (node for owner in classes for node in _statements(owner.body)):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name:
                    return _parameters(node)
            return None

        return parameters if classes else None


def changes(source: Source) -> Iterator[str]:
    """What in a vLLM differs from what the plug-in was written for, in words."""
    yield from changes_in(source.version, source.methods)
    for module, name in sorted(set(_imports())):
        if source.find(module, name) is None and source.module(f"{module}.{name}") is None:
            yield f"{module}.{name} does not exist"
    for owner in source.lineage(*_CONNECTOR):
        methods = [node for node in owner.body if isinstance(node, ast.FunctionDef)]
        for node in methods:
            if _is_decorated(node, "abstractmethod") and node.name not in HOOKS[":".join(_CONNECTOR)]:
                yield f"a {owner.name} has to define {node.name}"


def _imports() -> Iterator[tuple[str, str]]:
    """Modules of vLLM's and names in them that the plug-in imports when it runs."""
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for_types = {
            id(node)
            for branch in ast.walk(tree)
            if isinstance(branch, ast.If) and ast.unparse(branch.test) == "TYPE_CHECKING"
            for node in ast.walk(branch)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and id(node) not in for_types:
                module = node.module or ""
                if module == "vllm" or module.startswith("vllm."):
                    yield from ((module, alias.name) for alias in node.names)


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """A body's statements, and those under its conditions."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try):
            yield from _statements([*node.body, *node.orelse])


def _is_decorated(node: ast.FunctionDef | ast.AsyncFunctionDef, name: str) -> bool:
    return any(ast.unparse(decorator).split(".")[-1] == name for decorator in node.decorator_list)


def _parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """As `hooks` writes them."""
    if _is_decorated(node, "property"):
        return "nothing: it is not a method"
    arguments = node.args
    plain = [*arguments.posonlyargs, *arguments.args]
    defaults = [""] * (len(plain) - len(arguments.defaults)) + ["="] * len(arguments.defaults)
    texts = [argument.arg + default for argument, default in zip(plain, defaults, strict=True)]
    if arguments.vararg is not None:
        texts.append(f"*{arguments.vararg.arg}")
    for argument, value in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        texts.append(argument.arg + ("" if value is None else "="))
    if arguments.kwarg is not None:
        texts.append(f"**{arguments.kwarg.arg}")
    return ", ".join(texts[1:] if _is_decorated(node, "classmethod") else texts)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m cakekv.vllm.hooks_of_wheel", description=__doc__)
    parser.add_argument("vllm", type=Path, help="a wheel of vLLM, or a folder that vllm/ is in")
    try:
        source = Source(parser.parse_args().vllm)
    except BadInput as error:
        sys.exit(str(error))
    found = list(changes(source))
    tested = "is one of" if is_tested(source.version) else "is none of"
    print(f"vLLM {source.version} {tested} the versions that cakekv is tested with: {', '.join(VERSIONS)}")
    for change in found:
        print(f"- {change}")
    if found:
        sys.exit(1)
    print("Everything that cakekv uses looks the same in it.")


if __name__ == "__main__":
    main()
