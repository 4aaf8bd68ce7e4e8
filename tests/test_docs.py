"""What the documents show works: the README's code, the notebook, the skeletons."""

import doctest
import json
import os
import re
import shlex
import sys
import textwrap
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import nbclient
import nbformat
import numpy as np
import pytest
from rich.console import Console

from experiments import attack_matrix
from fedjax_sim import passes
from fedjax_sim.aggregators.common import normalize
from fedjax_sim.pytrees import ravel
from fedjax_sim.registry import require
from fedjax_sim.types import (
    AggregatorInfo,
    Array,
    Params,
    PyTree,
    RoundContext,
    Train,
)

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def indented_blocks(text):
    """Runs of lines indented by four spaces, as Markdown's code blocks."""
    blocks = re.findall(r"(?:^    .*\n|^\n(?=    ))+", text, re.MULTILINE)
    return [re.sub(r"^    ", "", block, flags=re.MULTILINE) for block in blocks]


def test_the_readme_s_library_example_runs(tmp_path, monkeypatch):
    blocks = indented_blocks((ROOT / "README.md").read_text())
    code = [block for block in blocks if block.strip().startswith("import ")]
    code = [block for block in code if "def near_median" not in block]
    assert len(code) == 2
    monkeypatch.chdir(tmp_path)
    scope = {}
    for block in code:
        block, count = re.subn(r"num_rounds=\d+", "num_rounds=10", block)
        assert count == 1
        exec(compile(block, "README.md", "exec"), scope)
    assert scope["history"].accuracy[-1] > 0.5
    assert set(scope["histories"]) == {"FLTrust", "Dual-System"}
    assert (tmp_path / "accuracy.png").exists()


def test_the_readme_s_own_rule_and_attack_run_under_the_matrix(tmp_path, monkeypatch):
    blocks = indented_blocks((ROOT / "README.md").read_text())
    (code,) = [block for block in blocks if "def near_median" in block]
    (command,) = [block for block in blocks if "mine.near_median" in block]
    assert len(code.split("def turn_back")[0].splitlines()) <= 30
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine.py").write_text(code)
    words = shlex.split(command.replace("\\\n", " "))
    assert words[1:3] == ["-m", "experiments.attack_matrix"]
    short = ["--model", "mlp", "--rounds", "6", "--num-seeds", "1"]
    words = [word.replace("[1, 5]", "[9]") for word in words]
    config = attack_matrix.parse([*words[3:], *short, "--out", str(tmp_path / "m")])
    with open(os.devnull, "w") as file:
        attack_matrix.run(config, Console(file=file))
    summary = json.loads((tmp_path / "m" / "summary.json").read_text())
    (setting,) = summary["settings"]
    assert set(setting["accuracy"]) == {"fedavg", "mine.near_median"}
    fedavg, own = (setting["accuracy"][name] for name in ("fedavg", "mine.near_median"))
    assert fedavg["none"] > 0.5 > fedavg["mine.turn_back(share=[9])"]
    assert own["mine.turn_back(share=[9])"] > 0.5


def test_the_tables_of_methods_are_those_of_the_code(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    import make_methods

    text = (ROOT / "README.md").read_text()
    assert make_methods.readme(text) == text, "run python docs/make_methods.py"
    assert make_methods.page() == (ROOT / "docs" / "methods.md").read_text()
    for registry in make_methods.REGISTRIES.values():
        assert all(f"| `{name}` |" in text for name in registry)


def test_the_readme_s_commands_exist():
    text = (ROOT / "README.md").read_text()
    # In a block of commands or set as code; "they make one" is prose.
    targets = set(re.findall(r"(?:^ +|`)make (\w+)", text, re.MULTILINE))
    makefile = (ROOT / "Makefile").read_text()
    assert {"demo", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for module in set(re.findall(r"python -m (experiments\.\w+)", text)):
        assert (ROOT / (module.replace(".", "/") + ".py")).exists(), module


def test_the_figures_on_defenses_are_those_measured():
    """Every row of the page's tables stands in a summary of the runs that it names."""
    page = (ROOT / "docs" / "which_defense.md").read_text()
    names = set(re.findall(r"\(results/([\w-]+)/summary\.md\)", page))
    results = [ROOT / "docs" / "results" / name / "summary.md" for name in names]
    measured = {row for path in results for row in path.read_text().splitlines()}
    rows = [row for row in page.splitlines() if row.startswith("|")]
    assert len(names) == 6
    assert len(rows) > 100
    assert set(rows) <= measured
    for rule in attack_matrix.PRESETS["defenses"].aggregators:
        assert f"| {rule.split('(')[0]} |" in page
    (code,) = [block for block in indented_blocks(page) if "def root_only" in block]
    scope = {}
    exec(compile(code, "which_defense.md", "exec"), scope)
    update = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    context = RoundContext(root_update=np.array([7.0, 8.0]))
    aggregate, _, info = scope["root_only"]().apply(update, (), context)
    assert aggregate.tolist() == [7.0, 8.0]
    assert info.flagged.all()
    assert info.weights.shape == (3,)


def test_contributing_s_skeletons_work_as_they_are():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    blocks = re.findall(r"^ *```python\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    modules = [textwrap.dedent(block) for block in blocks]
    modules = [code for code in modules if code.startswith('"""')]
    assert len(modules) == 3
    for code in modules:
        module = types.ModuleType("skeleton")
        exec(compile(code, "CONTRIBUTING.md", "exec"), module.__dict__)
        for thing in vars(module).copy().values():
            if getattr(thing, "__globals__", None) is vars(module):
                thing.__module__ = module.__name__
        result = doctest.testmod(module)
        assert result.attempted > 0
        assert result.failed == 0


def test_contributing_s_fragments_work_in_a_rule():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    blocks = re.findall(r"^ *```python\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)

    def run(start, **scope):
        (code,) = [c for c in map(textwrap.dedent, blocks) if c.startswith(start)]
        exec(compile(code, "CONTRIBUTING.md", "exec"), scope)
        return scope

    def scores(w):
        return jnp.square(w - 1).sum(), jnp.float32(0)

    context = RoundContext(params=jnp.zeros(1), root_scores=scores)
    U, mask = jnp.array([[0.5], [-1.0], [jnp.nan]]), jnp.array([True, True, False])
    shared = {"jax": jax, "jnp": jnp, "PyTree": PyTree}
    found = run(
        "# in apply",
        **shared,
        **{"require": require, "context": context, "U": U, "mask": mask},
        unravel=lambda u: u,
    )
    assert found["worse"].tolist() == [False, True, True]
    fragment = run(
        "def pretrain", **shared, Params=Params, Array=Array, Train=Train, ravel=ravel
    )

    def train(key, params):
        return params * jax.random.uniform(key)

    state = fragment["pretrain"](3.0 * jnp.ones(1), jax.random.key(0), train)
    assert 1 < state < 3
    with pytest.raises(ValueError, match="mine has to be pre-trained"):
        fragment["init"](jnp.ones(1), 3)

    names = {"passes": passes, "RoundContext": RoundContext, "normalize": normalize}
    names |= {"AggregatorInfo": AggregatorInfo, "factor": 1.2, "Array": Array}
    rule = run("def in_passes", **shared, **names)["in_passes"]
    U = jnp.array([[1.0], [2.0], [90.0], [jnp.nan]])
    rows = passes.Rows(lambda places: (U[places], ()), 4, 1, chunk=2, memory=8)
    aggregate, _, info = rule(rows, (), context)
    assert aggregate.tolist() == [1.5]
    assert info.flagged.tolist() == [False, False, True, True]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run_and_are_committed_without_outputs(path, monkeypatch):
    cells = json.loads(path.read_text())["cells"]
    assert not any(cell.get("outputs") for cell in cells)
    notebook = nbformat.read(path, as_version=4)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PYTHONWARNINGS", "default")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    plots = [
        output
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if "image/png" in output.get("data", {})
    ]
    assert len(plots) >= 3
