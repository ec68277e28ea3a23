"""The repository around the scripts: pins, headers, what they share, README."""

import ast
import os
import platform
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from runs import CASES

ROOT = Path(__file__).parent.parent
SCRIPTS = {path.name: path.read_text() for path in sorted(ROOT.glob("*.py"))}
ATARI = "plastic_drq_rainbow_atari.py"
README = (ROOT / "README.md").read_text()
PAGES = ["README.md", *sorted(f"benchmark/{p.name}" for p in (ROOT / "benchmark").glob("*.md"))]

needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="has no glibc")


def definitions(name):
    """{name: node} of a script's own classes and functions."""
    nodes = ast.parse(SCRIPTS[name]).body
    nodes = [node for node in nodes if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    return {node.name: node for node in nodes}


# --- Packages -------------------------------------------------------------------------------------


def pins(lines):
    """{package: version} of requirement lines, markers and comments aside."""
    stripped = [line.split("#")[0].split(";")[0].strip() for line in lines]
    return dict(line.split("==") for line in stripped if line)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_header_has_what_the_script_imports_with_the_pins_of_requirements_txt(name):
    """The block is parsed by the regular expression of its standard, PEP 723."""
    pattern = r"(?m)^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$"
    (match,) = re.finditer(pattern, SCRIPTS[name])
    block = tomllib.loads(re.sub(r"(?m)^# ?", "", match["content"]))
    # dm-control needs labmaze, which has no wheel for Python 3.13.
    assert block["requires-python"] == (">=3.11,<3.13" if "dmc" in name else ">=3.11")
    own = pins(block["dependencies"])
    assert own.items() <= pins((ROOT / "requirements.txt").read_text().splitlines()).items()

    modules = set()
    for node in ast.walk(ast.parse(SCRIPTS[name])):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module.split(".")[0])
    needed = {"tensorboard"}  # by torch.utils.tensorboard
    for module in modules - set(sys.stdlib_module_names) - {"wandb"}:
        needed.add({"PIL": "pillow", "dm_control": "dm-control"}.get(module, module))
    if "envpool" in needed:
        needed.add("gymnasium")  # of EnvPool's Gymnasium API
    if "dm-control" in needed:
        needed.add("mujoco")  # of which a later version breaks dm-control
    assert set(own) == needed


# --- What scripts share ---------------------------------------------------------------------------

OWN = {  # of the same name and purpose, but about each script's own data
    "": "Args Counters run plasticity_metrics Agent QNetwork make_agent evaluate_saved",
    # The others play Atari.
    "dmc": "Batch ReplayBuffer make_generators evaluate summary save_gif start_logging train "
    "save_checkpoint finish",
    # It has neither episodes nor models.
    "synth": "evaluate summary start_logging train save_checkpoint load_checkpoint finish",
}


def test_components_that_scripts_share_are_the_same_word_for_word():
    sources = {}
    for script, source in SCRIPTS.items():
        own = " ".join(names for part, names in OWN.items() if part in script).split()
        for name, node in definitions(script).items():
            if name not in own:
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                lines = source.splitlines()[first - 1 : node.end_lineno]
                sources.setdefault(name, []).append("\n".join(lines))
    shared = {name: versions for name, versions in sources.items() if len(versions) > 1}
    assert len(shared) > 10
    assert [name for name, versions in shared.items() if len(set(versions)) > 1] == []


LIFTED = {  # into a file of its own, with these lines before it
    "NoisyLinear": "import math\n",
    "ReplayBuffer": "from typing import NamedTuple\nimport numpy as np\nFRAME_STACK = 4\n",
    "sam_perturbed": "from collections.abc import Iterator\n"
    "from contextlib import contextmanager\n",
    "CReLU": "",
    "PixelLayerNorm": "",
    "reset_optimizer": "",
    "project": "",
}


@pytest.mark.parametrize("name", LIFTED)
def test_a_component_stands_alone(name):
    """Copied out with its imports, the replay buffer with Batch, it names no other thing."""
    nodes, parts = definitions(ATARI), ("Batch", name) if name == "ReplayBuffer" else (name,)
    lifted = (
        "import torch\nimport torch.nn.functional as F\nfrom torch import Generator, Tensor, nn\n"
    )
    lifted += LIFTED[name] + "\n".join(ast.unparse(nodes[part]) for part in parts)
    exec(lifted, {})
    undefined = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821", "-"]
    checked = subprocess.run(undefined, input=lifted, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


# --- Processes ------------------------------------------------------------------------------------


def in_a_process(code, **env):
    """What it prints, messages included."""
    clean = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=clean | env, cwd=ROOT, capture_output=True, text=True
    )
    return done.stdout + done.stderr


@needs_glibc
def test_openmp_knows_how_long_to_spin():
    """By what GNU OpenMP itself prints when PyTorch loads it, after the lines before that."""
    before = [source.split("import torch\n")[0] for source in SCRIPTS.values()]
    said = in_a_process(before[0] + "import torch\n", OMP_DISPLAY_ENV="verbose")
    assert "GOMP_SPINCOUNT = '1000'" in said
    assert all('os.environ.setdefault("GOMP_SPINCOUNT", "1000")\n\nimport' in b for b in before)
    for path in (ROOT / "benchmark").glob("*.py"):  # those that train or play import a script first
        first = path.read_text().split("import torch\n")[0]
        assert first == path.read_text() or "\nimport plastic_" in first


FAULTS = """
import resource, torch, plastic_drq_rainbow_atari as atari
for prepare in (lambda: None, atari.keep_freed_memory):
    prepare()
    for _ in range(3):
        torch.ones(20_000_000)  # 80 MB: above what glibc would learn to keep
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(20_000_000)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@needs_glibc
def test_freed_memory_is_kept():
    """Else each tensor comes from the kernel, 4 kB (or a huge page of 2 MB) a page fault."""
    faults = in_a_process(FAULTS).split()
    assert int(faults[0]) > 100 and int(faults[1]) < 10


# --- README ---------------------------------------------------------------------------------------


def test_readme_takes_five_minutes():
    assert len(README.encode()) <= 16_000
    assert "![" in README[:1_600]  # a picture on the first screen
    for command in ("plastic_drq_rainbow_atari.py --env-id Alien ", "-m pytest\n"):
        assert f"\npip install -r requirements.txt && python {command}" in README


def test_readme_shows_the_table_that_results_opens_with():
    claims = (ROOT / "benchmark/RESULTS.md").read_text().split("\n\n")[1]
    assert claims.startswith("| the paper claims | the paper | here | verdict | seeds |\n")
    assert README.split("\n\n").count(claims) == 1


ELSEWHERE = """--help --actions --logdir --json --script --plot --rounds --model --model-seed
--no-mps --partition --gres --per-gpu --time --dry-run --table --scores --benchmark
--csv --allow-missing --readme"""  # of others


def test_pages_name_only_flags_that_exist():
    names = {name for case in CASES.values() for name in case.script.Args.__dataclass_fields__}
    exist = {"--" + name.replace("_", "-") for name in names}
    exist |= {flag.replace("--", "--no-", 1) for flag in exist}
    pages = "".join((ROOT / page).read_text() for page in PAGES)
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", pages))
    assert named - exist <= set(ELSEWHERE.split())
    assert {"--layer-norm", "--crelu", "--sam-rho", "--reset-interval"} <= named


def test_readme_names_only_functions_that_exist():
    """The map from the paper to the code."""
    section = README.split("## The interventions, and where the paper is in the code")[1]
    rows = section.split("\n## ")[0].split("| method (Atari) | flags |")[0].splitlines()
    cells = [row.rstrip(" |").rsplit("|", 1)[-1] for row in rows if row.startswith("|")]
    named = set(re.findall(r"`([A-Za-z_.]+)`", " ".join(cells)))
    exist = set()
    for script in SCRIPTS:
        for name, node in definitions(script).items():
            methods = (n.name for n in node.body if isinstance(n, ast.FunctionDef))
            exist |= {name, *(f"{name}.{method}" for method in methods)}
    assert len(named) > 20
    assert named - exist == set()


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", (ROOT / page).read_text()):
        target, _, anchor = link.partition("#")
        if not target.startswith("https:"):
            path = (ROOT / page).parent / target if target else ROOT / page
            assert path.exists(), link
            if anchor:
                headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
                anchors = [re.sub(r"[^\w -]", "", heading.lower()) for heading in headings]
                assert anchor in [words.replace(" ", "-") for words in anchors]
