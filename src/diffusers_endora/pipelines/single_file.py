"""The self-contained pipeline file for `custom_pipeline=`, put together from the package's own sources.

`python -m diffusers_endora.pipelines.single_file PATH` writes it to PATH.
"""

import ast
import sys
from pathlib import Path

HEADER = '''"""Endora as one self-contained file, for `DiffusionPipeline.from_pretrained(..., custom_pipeline=...)`.

Generated from the package diffusers-endora (`make single-file`); do not edit. Needs torch and diffusers only.
"""

'''

FOOTER = '''

def single_file_source() -> str:
    """The source of this file, which `EndoraPipeline.save_pretrained` writes beside the weights."""
    return Path(__file__).read_text(encoding="utf-8")


if not hasattr(diffusers, "EndoraTransformer3DModel"):  # the package, where it is imported, comes first
    diffusers.EndoraTransformer3DModel = EndoraTransformer3DModel
'''

SOURCES = ("models/transformer_endora.py", "pipelines/pipeline_output.py", "pipelines/pipeline_endora.py")


def single_file_source() -> str:
    """The text of `pipelines/endora/pipeline.py`: imports, transformer, output class and pipeline, in that order.

    Absolute imports of the modules are merged at the top, relative ones dropped.
    """
    package = Path(__file__).resolve().parents[1]
    plain, bodies = {"import diffusers"}, []
    named: dict[str, set[str]] = {}
    for source in SOURCES:
        text = (package / source).read_text(encoding="utf-8")
        tree, lines = ast.parse(text), text.splitlines()
        body_starts = 0
        for node in tree.body:
            if isinstance(node, ast.Import):
                plain.add(ast.unparse(node))
            elif isinstance(node, ast.ImportFrom):
                if node.level == 0 and node.module:
                    named.setdefault(node.module, set()).update(ast.unparse(alias) for alias in node.names)
            elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and node is tree.body[0]:
                pass  # the module's docstring
            else:
                break
            body_starts = node.end_lineno or body_starts
        bodies.append("\n".join(lines[body_starts:]).strip())
    imports = sorted(plain) + [f"from {module} import {', '.join(sorted(named[module]))}" for module in sorted(named)]
    return HEADER + "\n".join(imports) + "\n\n\n" + "\n\n\n".join(bodies) + "\n" + FOOTER


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(single_file_source(), encoding="utf-8")
