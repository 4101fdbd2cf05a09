"""The levels of the design, and imports that cost and change nothing."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import dalle_mini_impl

ROOT = Path(dalle_mini_impl.__file__).parent
PACKAGE = "dalle_mini_impl"
LEVELS = [
    {
        "config",
        "stream",
        "text",
        "memory",
        "threads",
        "files",
        "weights",
        "compiled",
        "precision",
        "flops",
        "out_of_memory",
    },
    {"layers", "noise", "filters", "frechet", "nearest"},
    {"captioner", "native"},
    {"vae", "dalle", "clip", "prior"},
    {
        "sampling",
        "decoding",
        "engine",
        "editing",
        "data",
        "embed",
        "rerank",
        "classify",
        "search",
        "unclip",
        "guided",
        "pretrained",
        "pretrained_clip",
        "sheet",
    },
    {"training", "drawn", "drawing", "pipeline"},
    {"cli", "web", "bench", "evaluate", "evaluate_clip", "estimate", "report", "__main__"},
]
LEVEL_OF = {module: level for level, modules in enumerate(LEVELS) for module in modules}
WITHIN_A_LEVEL = {
    ("text", "config"),
    ("text", "stream"),
    ("weights", "files"),
    ("__main__", "cli"),
    ("sampling", "decoding"),
    ("sampling", "engine"),
    ("decoding", "engine"),
    ("editing", "decoding"),
    ("cli", "evaluate"),
    ("cli", "evaluate_clip"),
    ("evaluate_clip", "evaluate"),
    ("cli", "bench"),
    ("cli", "estimate"),
    ("cli", "web"),
    ("web", "cli"),
    ("cli", "report"),
    ("bench", "estimate"),
    ("rerank", "embed"),
    ("classify", "embed"),
    ("drawing", "drawn"),
    ("pipeline", "drawing"),
    ("pipeline", "drawn"),
    ("unclip", "embed"),
    ("unclip", "pretrained"),
    ("embed", "data"),
    ("pretrained", "embed"),
    ("pretrained_clip", "embed"),
    ("pretrained_clip", "data"),
    ("pretrained_clip", "sheet"),
    ("guided", "embed"),
}
"""Imports between neighbours of a level; those inside of one directory are always fine."""


def _files() -> list[Path]:
    return sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def _top(path: Path) -> str:
    """The entry of LEVELS that a file belongs to."""
    return path.relative_to(ROOT).with_suffix("").parts[0]


def _imported(tree: ast.Module, path: Path) -> set[str]:
    """Top-level modules of the package that a file imports, anywhere in it; "" is the package itself."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write it in full"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == PACKAGE:
                found.add(rest.split(".")[0])
    return found


def test_every_module_has_a_level() -> None:
    unknown = {_top(path) for path in _files()} - set(LEVEL_OF)
    assert not unknown, f"give {unknown} a place in LEVELS"


@pytest.mark.parametrize("path", _files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    module = _top(path)
    for imported in _imported(ast.parse(path.read_text(encoding="utf-8")), path) - {module}:
        if imported in dalle_mini_impl.__all__:
            assert imported == "__version__", f"{path}: import {imported} from its own module"
            continue
        allowed = LEVEL_OF[imported] < LEVEL_OF[module] or (module, imported) in WITHIN_A_LEVEL
        assert allowed, f"{module} (level {LEVEL_OF[module]}) imports {imported} (level {LEVEL_OF[imported]})"


def _python(code: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_package_itself_loads_nothing(tmp_path: Path) -> None:
    code = f"""
import sys; sys.path.insert(0, {str(ROOT.parent)!r})
before = set(sys.modules)
import dalle_mini_impl
assert dalle_mini_impl.__version__
heavy = {{"torch", "numpy", "pydantic", "sentencepiece", "datasets", "PIL"}} & (set(sys.modules) - before)
assert not heavy, heavy
"""
    _python(code, tmp_path)


def test_importing_every_module_changes_nothing(tmp_path: Path) -> None:
    """No grad mode, threads, default dtype, random state, log handlers, environment, CUDA, output or files."""
    code = f"""
import sys; sys.path.insert(0, {str(ROOT.parent)!r})
import json, logging, os, random, warnings
# Loaded first, since what others do is not ours: rich, for one, draws random numbers for its styles.
import accelerate, datasets, gradio, matplotlib.pyplot, numpy, rich.progress, torch, typer
def state():
    return dict(grad=torch.is_grad_enabled(), dtype=str(torch.get_default_dtype()), threads=torch.get_num_threads(),
        rng=torch.get_rng_state().tolist(), python=str(random.getstate()), numpy=str(numpy.random.get_state()),
        handlers=str(logging.getLogger().handlers), level=logging.getLogger().level, cuda=torch.cuda.is_initialized(),
        environment=dict(os.environ), filters=len(warnings.filters), backend=matplotlib.get_backend(),
        deterministic=torch.are_deterministic_algorithms_enabled(), precision=torch.get_float32_matmul_precision())
before = state()
import importlib, pkgutil
import dalle_mini_impl
for module in pkgutil.walk_packages(dalle_mini_impl.__path__, "dalle_mini_impl."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
print(json.dumps([key for key, value in state().items() if value != before[key]]))
"""
    assert json.loads(_python(code, tmp_path)) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", sorted(set(dalle_mini_impl.__all__) - {"__version__"}))
def test_public_names_load(name: str) -> None:
    value = getattr(dalle_mini_impl, name)
    assert isinstance(value, type)
    assert name in dir(dalle_mini_impl)
    assert value.__name__ == name


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="Dalle"):
        _ = dalle_mini_impl.Dalle
