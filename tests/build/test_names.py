"""No name of TensorRT is invented: all that our code uses is in the real bindings of every version."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
BUILD = [ROOT / "build" / f"{name}.py" for name in ("builder", "plugins", "progress", "timing_cache")]
FILES = [ROOT / "trt.py", *BUILD, *(ROOT / "runtime/backends").glob("tensorrt*.py")]
# what variables and attributes of these names hold, in these files
OBJECTS = {
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "error": "ParserError",
    "config": "IBuilderConfig",
    "profile": "IOptimizationProfile",
    "cache": "ITimingCache",
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
}
HOLD_OTHERS = {"builder.py": {"engine"}}

CHECK = """
import inspect
import tensorrt as trt
import tensorrt.plugin as trtp

def find(root, path):
    value = {"trt": trt, "trtp": trtp}[root]
    for name in path:
        value = inspect.getattr_static(value, name) if isinstance(value, type) else getattr(value, name)
    return value

result = []
for use in uses:
    what = f"{use['where']}: {use['root']}.{'.'.join(use['path'])}"
    try:
        found = find(use["root"], use["path"])
    except AttributeError:
        result.append(f"{what} does not exist")
        continue
    if use["kind"] == "set" and not (isinstance(found, property) and found.fset):
        result.append(f"{what} cannot be set")
    if use["kind"] != "call" or use["root"] != "trt":
        continue
    if isinstance(found, type):
        found = inspect.getattr_static(found, "__init__")
    documented = parameters(getattr(found, "__doc__", None) or find(use["root"], use["path"]).__doc__,
                            getattr(found, "__name__", use["path"][-1]))
    if not documented:
        result.append(f"{what} has no documented arguments")
    fits = [
        p for p in documented
        if use["count"] <= len(p) and set(use["keywords"]) <= {name for name, _ in p[use["count"]:]}
        and all(optional or name in use["keywords"] for name, optional in p[use["count"]:])
    ]
    if documented and not fits:
        result.append(f"{what} is called with {use['count']} and {use['keywords']}, it takes {documented}")
for where, base, methods in classes:
    for name, arguments in methods.items():
        if name == "__init__":
            continue
        found = inspect.getattr_static(find("trt", base.split(".")), name, None)
        (documented,) = parameters(found.__doc__ if found else None, name) or [[]]
        names = [p for p, _ in documented]
        if not found or names[: len(arguments)] != arguments:
            result.append(f"{where}: {base}.{name}{arguments} overrides {names}")
"""


def root_of(node: ast.expr) -> str | None:
    """`trt` and `self.trt` are the module, whoever holds it."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
        return node.attr
    return node.id if isinstance(node, ast.Name) else None


def path_of(node: ast.expr, others: set[str]) -> tuple[str, list[str]] | None:
    """trt.A.b, or config.b for a name in OBJECTS: its root and what lies under it."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        root = root_of(node)
        if root in ("trt", "trtp") and names:
            return root, names
        if root in OBJECTS and root not in others and names:
            return "trt", [OBJECTS[root], names[0]]
        names.insert(0, node.attr)
        node = node.value
    root = root_of(node)
    if root in ("trt", "trtp") and names:
        return root, names
    if root in OBJECTS and root not in others and names:
        return "trt", [OBJECTS[root], names[0]]
    return None


def uses(file: Path) -> Iterator[dict[str, Any]]:
    others = HOLD_OTHERS.get(file.name, set())
    tree = ast.parse(file.read_text())
    inner = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    called = {id(n.func): n for n in ast.walk(tree) if isinstance(n, ast.Call)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or id(node) in inner or not (found := path_of(node, others)):
            continue
        call = called.get(id(node))
        use = {"where": f"{file.name}:{node.lineno}", "root": found[0], "path": found[1], "kind": "get"}
        if isinstance(node.ctx, ast.Store):
            use["kind"] = "set"
        if call and not any(isinstance(a, ast.Starred) for a in call.args):
            use |= {"kind": "call", "count": len(call.args), "keywords": [k.arg for k in call.keywords]}
        if call and found[1][-1] == "__init__":  # TRT's base class, called with self
            use["count"] -= 1
        yield use


def classes(file: Path) -> Iterator[tuple[str, str, dict[str, list[str]]]]:
    """Classes that TensorRT calls back: where, base, methods with their arguments."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ClassDef):
            for base in node.bases:
                if (found := path_of(base, set())) and found[0] == "trt":
                    methods = {
                        f.name: [a.arg for a in f.args.args[1:]]
                        for f in node.body
                        if isinstance(f, ast.FunctionDef)
                    }
                    yield f"{file.name}:{node.lineno}", ".".join(found[1]), methods


def test_every_name_is_in_the_bindings_and_every_call_fits_its_docstring(bindings: Any) -> None:
    from .recording import PARAMETERS

    found = [use for file in FILES for use in uses(file)]
    derived = [c for file in FILES for c in classes(file)]
    problems = bindings.run(PARAMETERS + CHECK, uses=found, classes=derived)
    assert not problems, "\n".join(problems)


def test_the_walk_sees_what_is_there(tmp_path: Path) -> None:
    """Of each kind at least what a reader finds at once."""
    seen = {f"{u['root']}.{'.'.join(u['path'])}" for file in FILES for u in uses(file)}
    assert {
        "trt.Builder", "trt.BuilderFlag.REFIT", "trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03",
        "trt.Builder.build_serialized_network_to_stream", "trt.IBuilderConfig.progress_monitor",
        "trt.IOptimizationProfile.set_shape", "trt.ILogger.Severity", "trt.IStreamWriter.__init__",
        "trt.ITimingCache.serialize", "trt.Runtime.deserialize_cuda_engine",
        "trt.IExecutionContext.execute_async_v3", "trtp.register", "trtp.aot_impl",
        "trtp.KernelLaunchParams",
    } <= seen  # fmt: skip
    assert {base for file in FILES for _, base, _ in classes(file)} == {
        "ILogger", "IProgressMonitor", "IStreamWriter"
    }  # fmt: skip


@pytest.mark.parametrize(
    "code, problem",
    [
        ("trt.BuilderFlag.FASTER", "trt.BuilderFlag.FASTER does not exist"),
        ("config.set_speed(3)", "trt.IBuilderConfig.set_speed does not exist"),
        ("self.config.set_flag(1, 2)", "is called with 2 and [], it takes"),
        ("parser.parse_from_file(path=1)", "is called with 0 and ['path'], it takes"),
        ("config.num_optimization_profiles = 2", "cannot be set"),
        ("class A(trt.IStreamWriter):\n def send(self, data): ...", "send['data'] overrides []"),
        ("class A(trt.IStreamWriter):\n def write(self, bytes): ...", "overrides ['data', 'size']"),
        ("trtp.faster", "trtp.faster does not exist"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("bindings", ["11.4.0.106"], indirect=True, scope="session")
def test_an_invented_name_or_argument_is_found(
    bindings: Any, tmp_path: Path, code: str, problem: str
) -> None:
    from .recording import PARAMETERS

    file = tmp_path / "invented.py"
    file.write_text(code)
    found, derived = list(uses(file)), list(classes(file))
    (line,) = bindings.run(PARAMETERS + CHECK, uses=found, classes=derived)
    assert problem in line
