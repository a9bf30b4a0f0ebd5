"""The rules of the house that can be read off the source: who imports whom, and what it costs."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "peft_fsrl"
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
}

# Which modules of the package each may import. A package stands for everything inside it, and the
# most specific entry counts. What has no entry may not exist: add one on purpose.
ALLOWED = {
    "__main__": {"cli.main"},
    "_card_section": {"_checkpoints"},
    "__init__": {
        "_identity",
        "_registration",
        "config",
        "equivalence",
        "layer",
        "model",
        "pruning",
        "sae",
        "sae_sources",
        "steering",
    },
    "_checkpoints": set(),
    "_registration": {"_saving", "config", "model"},
    "_saving": {"_card_section", "_checkpoints"},
    "arguments": {"config"},
    "card": {"config"},
    "_fields": set(),
    "config": {"_checkpoints", "_fields"},
    "functional": set(),
    "_identity": set(),
    "_sae_modules": set(),
    "_sparse": {"_tracing"},
    "_tracing": set(),
    "_outputs": set(),
    "_running": set(),
    "_watch": set(),
    "sae": {"_identity", "_sae_modules", "_sparse", "functional"},
    "sae_sources": {"_identity", "_sae_modules", "sae"},
    "convert": {"config", "sae_sources", "targets"},
    "layer": {
        "_outputs",
        "_sparse",
        "_tracing",
        "_watch",
        "adapter",
        "config",
        "events",
        "functional",
        "fused",
        "sae",
    },
    "events": {"sae"},
    "fused": {"_pointwise", "_tiles", "functional"},
    "_tiles": set(),
    "_pointwise": set(),
    "adapter": {"config"},
    "model": {"config", "layer", "sae", "sae_sources", "targets"},
    "targets": {"config", "sae", "sae_sources"},
    "steering": {"events", "layer", "sae"},
    "pruning": {"_fields", "_running", "layer", "steering", "targets"},
    "nonfinite": {"steering"},
    "trl": {
        "_card_section",
        "_metrics",
        "_prefix",
        "_resume",
        "_support",
        "_thresholds",
        "card",
        "nonfinite",
        "penalty",
        "schedule",
        "steering",
    },
    "penalty": {"functional", "steering"},
    "schedule": {"steering"},
    "simpo": {"objectives"},
    "objectives": set(),
    "_metrics": {"steering"},
    "_prefix": {"layer", "steering", "targets"},
    "_resume": set(),
    "_support": {"steering"},
    "_thresholds": {"steering"},
    "tokens": set(),
    "data": {"tokens"},
    "coherence": {"analysis.coherence"},
    "equivalence": {
        "_outputs",
        "_running",
        "adapter",
        "config",
        "equivalence",
        "functional",
        "layer",
        "sae",
    }
    | {"sae_sources", "steering", "targets"},
    "analysis.records": {"analysis.records"},
    "analysis.plots": {"analysis.plots", "analysis.records"},
    "analysis.report": {"analysis.layout", "analysis.records"},
    "analysis.statistics": {"analysis.records"},
    "analysis.buckets": {"analysis.records", "analysis.statistics"},
    "analysis.audit": {"analysis", "layer", "steering"},
    "analysis.audit.card": {"_card_section", "_checkpoints", "analysis"},
    "analysis.audit.findings": {"analysis.records"},
    "analysis.audit_report": {"analysis.layout", "analysis.records", "analysis.report"},
    "analysis.writing": set(),
    "analysis.checkup": {"analysis.records"},
    "analysis.diff": {"analysis", "layer"},
    "analysis.doctor": {
        "_outputs",
        "_running",
        "analysis",
        "sae",
        "sae_sources",
        "targets",
        "tokens",
    },
    "analysis.layout": set(),
    "analysis.rendering": {"analysis.records", "analysis.rendering"},
    "analysis.segments": {"_running", "analysis.preferences", "layer", "sae", "steering", "tokens"},
    "analysis.composition": {"analysis", "sae"},
    "analysis.curves": {"analysis.records"},
    "analysis.single": {"_outputs", "_running", "analysis", "functional", "layer", "objectives"}
    | {"steering"},
    "analysis.ranking": {
        "_outputs",
        "analysis",
        "config",
        "objectives",
        "sae",
        "sae_sources",
        "targets",
    },
    "analysis": {"_running", "analysis", "objectives", "steering", "tokens"},
    "cli.eval": {"analysis", "cli._inputs", "steering"},
    "cli.main": set(),
    "cli._inputs": {"analysis", "data", "organism"},
    "cli.audit": {"analysis", "cli._inputs"},
    "cli.diff": {"analysis", "cli._inputs"},
    "cli.doctor": {"analysis", "cli._inputs", "organism"},
    "cli.labels": {"analysis", "cli._inputs"},
    "cli.lm_eval": {"analysis.harness"},
    "cli": set(),
    "organism": {"", "config", "equivalence", "functional", "layer", "model", "organism", "sae"}
    | {"steering"},
}
# Libraries that only these modules may import. The rest of the package works without them.
OPTIONAL = {
    "sae_lens": {"_sae_modules", "organism", "sae", "sae_sources"},
    "trl": {"data", "simpo", "trl"},
    "jinja2": {"analysis.rendering._environment"},
    "lm_eval": {"analysis.harness"},
    "openai": {"analysis.labels.judge"},
    "matplotlib": {"analysis.plots._style"},
    "scipy": {"analysis.statistics"},
    "sklearn": {"analysis.statistics"},
}
# Modules that may import these libraries and the standard library, and nothing else.
SELF_CONTAINED = {
    "_checkpoints": set(),
    "functional": {"torch"},
    "_sparse": {"torch"},
    "_fields": {"huggingface_hub"},
    "config": {"peft"},
    "_registration": {"peft"},
    "analysis.records": set(),
}


def is_inside(module: str, owners: set[str]) -> bool:
    """Whether a module is one of the owners or lies inside one that is a package."""
    return any(module == owner or module.startswith(f"{owner}.") for owner in owners)


def rule_of(module: str) -> set[str] | None:
    """The most specific entry of ALLOWED for a module."""
    names = [".".join(module.split(".")[:depth]) for depth in range(module.count(".") + 1, 0, -1)]
    return next((ALLOWED[name] for name in names if name in ALLOWED), None)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def walk(node: ast.AST, with_types: bool) -> Iterator[ast.AST]:
    """All nodes below one, with or without what only a type checker sees."""
    for child in ast.iter_child_nodes(node):
        yield child
        if with_types or not is_type_checking(child):
            yield from walk(child, with_types)


def imported(module: str, with_types: bool) -> set[str]:
    """Absolute names of what a module imports, at its top or inside functions."""
    path = MODULES[module]
    parents = ["peft_fsrl", *module.split(".")[:-1]]
    names = set()
    for node in walk(ast.parse(path.read_text("utf-8")), with_types):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = parents[: len(parents) - node.level + 1] if node.level else []
            origin = ".".join([*base, *filter(None, [node.module])])
            # `from package import x` imports the module package.x if there is one.
            found = {f"{origin}.{alias.name}" for alias in node.names}
            inside = {name for name in found if name.removeprefix("peft_fsrl.") in MODULES}
            names |= inside or {origin}
    return names


@pytest.mark.parametrize("module", MODULES)
def test_imports_inside_the_package(module: str) -> None:
    allowed = rule_of(module)
    assert allowed is not None, f"{module} has no entry in ALLOWED"
    names = {name for name in imported(module, with_types=True) if name.startswith("peft_fsrl")}
    inside = {name.removeprefix("peft_fsrl").removeprefix(".") for name in names}
    assert {name for name in inside if not is_inside(name, allowed)} == set()


@pytest.mark.parametrize("module", MODULES)
def test_optional_libraries_have_one_owner(module: str) -> None:
    libraries = {name.partition(".")[0] for name in imported(module, with_types=False)}
    foreign = {
        name for name in libraries & OPTIONAL.keys() if not is_inside(module, OPTIONAL[name])
    }
    assert foreign == set()


@pytest.mark.parametrize("module", sorted(SELF_CONTAINED.keys() & MODULES.keys()))
def test_self_contained(module: str) -> None:
    libraries = {name.partition(".")[0] for name in imported(module, with_types=False)}
    own = SELF_CONTAINED[module] | {"peft_fsrl"}
    assert libraries - own - set(sys.stdlib_module_names) == set()


@pytest.mark.parametrize("module", MODULES)
def test_short_and_silent(module: str) -> None:
    source = MODULES[module].read_text("utf-8")
    length = source.count("\n")
    assert length <= 350, "split it: no file is longer than 350 lines"
    calls = [node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    prints = [f.lineno for f in calls if isinstance(f, ast.Name) and f.id == "print"]
    assert prints == [], "use logging"


def run_python(code: str) -> str:
    """Run code in a fresh interpreter and return the last line that it printed."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_import_is_light() -> None:
    code = """
import json, sys, time
import peft
before, start = set(sys.modules), time.perf_counter()
import peft_fsrl
print(json.dumps([time.perf_counter() - start, sorted(set(sys.modules) - before)]))
"""
    heavy = {"trl", "sae_lens", "transformer_lens", "matplotlib", "datasets"}
    heavy |= {"peft_fsrl.training.trainer", "peft_fsrl.analysis", "peft_fsrl.organism"}
    seconds = []
    # The best of a few: a busy machine makes any single measurement slow.
    for _ in range(5):
        elapsed, added = json.loads(run_python(code))
        assert heavy & set(added) == set()
        seconds.append(elapsed)
        if elapsed < 1.0:
            break
    assert min(seconds) < 1.0


def test_importing_again_is_safe() -> None:
    code = """
import importlib, sys
import peft, peft_fsrl
for name in [name for name in sys.modules if name.startswith("peft_fsrl")]:
    importlib.reload(sys.modules[name])
importlib.reload(peft_fsrl)
for name in [name for name in sys.modules if name.startswith("peft_fsrl")]:
    del sys.modules[name]
import peft_fsrl
config = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType("FSRL")]
print(config is peft_fsrl.FSRLConfig and [m.name for m in peft.PeftType].count("FSRL") == 1)
"""
    assert run_python(code) == "True"
