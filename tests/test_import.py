"""What `import diffusers_endora` costs and brings, in fresh processes."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import diffusers_endora

PACKAGE = Path(diffusers_endora.__file__).parent
MEASURE = """
import json, sys, time
from diffusers import DiffusionPipeline

before, start = set(sys.modules), time.process_time()
import diffusers_endora

print(json.dumps([time.process_time() - start, sorted(set(sys.modules) - before)]))
"""


def measured_import() -> tuple[float, set[str]]:
    """Processor seconds of `import diffusers_endora` after diffusers' DiffusionPipeline, and the modules it adds."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MEASURE]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    seconds, modules = json.loads(process.stdout.splitlines()[-1])
    return seconds, set(modules)


def test_importing_costs_little_beside_diffusers_and_brings_nothing_heavy():
    runs = []
    for _ in range(3):  # a busy machine may disturb one run; the least is the cost
        runs.append(measured_import())
        if runs[-1][0] < 0.3:
            break
    assert min(seconds for seconds, _ in runs) < 0.3

    _, modules = runs[0]
    assert "diffusers_endora.pipelines.pipeline_endora" in modules
    assert {name.partition(".")[0] for name in modules} <= {"diffusers", "diffusers_endora"}
    rooms = {name.split(".")[1] for name in modules if name.count(".") > 0 and name.startswith("diffusers_endora")}
    assert rooms == {"models", "pipelines"}


@pytest.mark.parametrize("name", diffusers_endora.__all__)
def test_every_public_name_resolves_to_what_it_names(name):
    value = getattr(diffusers_endora, name)
    assert value.__name__ == name
    assert value.__module__.startswith("diffusers_endora.")


def test_the_lists_of_public_names_agree():
    """`__all__`, the names imported on use, and those that a type checker is told of."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    for_type_checkers = {
        alias.name: node.module
        for block in tree.body
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in block.body
        for alias in node.names
    }
    assert for_type_checkers == diffusers_endora.LAZY_NAMES
    assert set(diffusers_endora.LAZY_NAMES) < set(diffusers_endora.__all__)
    assert len(diffusers_endora.__all__) == len(set(diffusers_endora.__all__))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'diffusers_endora' has no attribute 'EndoraTransformer2DModel'"):
        diffusers_endora.EndoraTransformer2DModel  # noqa: B018
