"""The repository around the scripts: pins, headers, README."""

import ast
import os
import platform
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(path for path in ROOT.glob("*.py"))
README = (ROOT / "README.md").read_text()
INSTALL = "pip install -r requirements.txt"
COMMANDS = (
    f"{INSTALL} && python plastic_drq_rainbow_atari.py --env-id Alien --sam-rho 0.1 --replay-ratio 4",
    f"{INSTALL} && python -m pytest",
)


def pins(lines):
    """{package: version} of requirement lines, markers and comments aside."""
    stripped = [line.split("#")[0].split(";")[0].strip() for line in lines]
    return dict(line.split("==") for line in stripped if line)


def header(script):
    """The script's PEP 723 block, parsed by the standard's own regular expression."""
    pattern = r"(?m)^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$"
    (match,) = [m for m in re.finditer(pattern, script.read_text()) if m["type"] == "script"]
    lines = match["content"].splitlines(keepends=True)
    return tomllib.loads("".join(line.removeprefix("#").removeprefix(" ") for line in lines))


def test_there_are_scripts():
    assert "plastic_drq_rainbow_atari.py" in [script.name for script in SCRIPTS]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_header_pins_are_those_of_requirements_txt(script):
    requirements = pins((ROOT / "requirements.txt").read_text().splitlines())
    block = header(script)
    # dm-control needs labmaze, which has no wheel for Python 3.13.
    assert block["requires-python"] == (">=3.11,<3.13" if "dmc" in script.name else ">=3.11")
    own = pins(block["dependencies"])
    assert own == {package: requirements[package] for package in own}


PACKAGE_OF_MODULE = {"PIL": "pillow", "dm_control": "dm-control"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_header_names_what_the_script_imports(script):
    tree = ast.parse(script.read_text())
    modules = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    packages = (
        {module.split(".")[0] for module in modules} - set(sys.stdlib_module_names) - {"wandb"}
    )
    packages = {PACKAGE_OF_MODULE.get(package, package) for package in packages}
    packages |= {"tensorboard"}  # of torch.utils.tensorboard
    if "dm-control" in packages:
        packages |= {"mujoco"}  # of which a later version breaks dm-control
    if "envpool" in packages:
        packages |= {"gymnasium"}  # of EnvPool's Gymnasium API
    assert packages == set(pins(header(script)["dependencies"]))


OWN = set(  # of the same name and purpose in several scripts, but about each one's own data
    "Args Counters run train save_checkpoint load_checkpoint plasticity_metrics Agent QNetwork "
    "make_agent evaluate_saved".split()
)
OWN_IN_DMC = set(  # the others play Atari
    "Batch ReplayBuffer make_generators evaluate summary save_gif start_logging finish".split()
)
# It has neither episodes nor models.
OWN_IN_SYNTH = set("evaluate start_logging remove_old_files finish".split())


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="has no GNU OpenMP")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_openmp_knows_how_long_to_spin(script):
    """By what GNU OpenMP itself prints when PyTorch loads it, after the lines before that."""
    code = script.read_text().split("import torch\n")[0] + "import torch\n"
    env = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    finished = subprocess.run(
        [sys.executable, "-c", code],
        env=env | {"OMP_DISPLAY_ENV": "verbose"},
        capture_output=True,
        text=True,
    )
    assert "GOMP_SPINCOUNT = '1000'" in finished.stderr


def test_components_that_scripts_share_are_the_same_word_for_word():
    sources = {}
    for script in SCRIPTS:
        text = script.read_text()
        for node in ast.parse(text).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name not in OWN:
                if "dmc" in script.name and node.name in OWN_IN_DMC:
                    continue
                if "synth" in script.name and node.name in OWN_IN_SYNTH:
                    continue
                start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                lines = text.splitlines()[start - 1 : node.end_lineno]
                sources.setdefault(node.name, {})[script.name] = "\n".join(lines)
    shared = {name: versions for name, versions in sources.items() if len(versions) > 1}
    assert len(shared) > 10
    assert [name for name, versions in shared.items() if len(set(versions.values())) > 1] == []


TORCH = "import torch\nimport torch.nn.functional as F\nfrom torch import Generator, Tensor, nn\n"
LIFTED = {  # into a file of its own, with these lines before it
    "NoisyLinear": "import math\n",
    "ReplayBuffer": "from typing import NamedTuple\nimport numpy as np\nFRAME_STACK = 4\n",
    "sam_perturbed": "from collections.abc import Iterator\nfrom contextlib import contextmanager\n",
    "CReLU": "",
    "PixelLayerNorm": "",
    "reset_optimizer": "",
    "project": "",
}


@pytest.mark.parametrize("name", LIFTED)
def test_a_component_stands_alone(name):
    """Copied out with its imports (the replay buffer with Batch), it names nothing else of the script."""
    source = (ROOT / "plastic_drq_rainbow_atari.py").read_text()
    wanted = (name, "Batch") if name == "ReplayBuffer" else (name,)
    parts = [node for node in ast.parse(source).body if getattr(node, "name", "") in wanted]
    lifted = TORCH + LIFTED[name] + "\n".join(ast.unparse(part) for part in parts)
    exec(lifted, {})
    undefined = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821", "-"]
    checked = subprocess.run(undefined, input=lifted, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


FAULTS = """
import resource, torch, plastic_drq_rainbow_atari as atari
KEEP
for _ in range(3):
    torch.ones(20_000_000)  # 80 MB: above what glibc would learn to keep
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(20_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="no glibc")
def test_freed_memory_is_kept():
    """Else each tensor comes from the kernel, 4 kB (or a huge page of 2 MB) a page fault."""
    faults = []
    for keep in ("", "atari.keep_freed_memory()"):
        command = [sys.executable, "-c", FAULTS.replace("KEEP", keep)]
        faults.append(int(subprocess.check_output(command, cwd=ROOT)))
    assert faults[0] > 100 and faults[1] < 10


@pytest.mark.parametrize("command", COMMANDS)
def test_readme_has_the_two_commands(command):
    assert f"\n{command}\n" in README


def test_readme_names_only_flags_that_exist():
    import plastic_drq_rainbow_atari as atari
    import plastic_drq_sac_dmc as dmc
    import plastic_pretrained_finetune as finetune
    import synth_cifar_plasticity as synth

    names = [
        name
        for script in (atari, dmc, finetune, synth)
        for name in script.Args.__dataclass_fields__
    ]
    fields = {"--" + name.replace("_", "-") for name in names}
    fields |= {flag.replace("--", "--no-", 1) for flag in fields}
    elsewhere = "--help --logdir --json --script --plot --rounds --model"  # of tyro, TensorBoard and benchmark/
    elsewhere += " --no-mps --partition --jobs --per-gpu --time --dry-run --table --scores --allow-missing --readme"
    pages = README + "".join(page.read_text() for page in (ROOT / "benchmark").glob("*.md"))
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", pages))
    assert flags - set(elsewhere.split()) <= fields
    interventions = {
        "--layer-norm",
        "--crelu",
        "--sam-rho",
        "--reset-interval",
        "--shrink-perturb-alpha",
    }
    assert interventions <= flags


def test_readme_names_only_functions_that_exist():
    """The map from the paper to the code."""
    section = README.split("## The interventions, and where the paper is in the code")[1]
    rows = section.split("\n## ")[0].split("| method (Atari) | flags |")[0].splitlines()
    cells = [row.rstrip(" |").rsplit("|", 1)[-1] for row in rows if row.startswith("|")]
    names = re.findall(r"`([A-Za-z_.]+)`", " ".join(cells))
    defined = set()
    for node in [node for script in SCRIPTS for node in ast.parse(script.read_text()).body]:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            defined.add(node.name)
        if isinstance(node, ast.ClassDef):
            defined |= {
                f"{node.name}.{n.name}" for n in node.body if isinstance(n, ast.FunctionDef)
            }
    assert len(names) > 20
    assert set(names) <= defined


@pytest.mark.parametrize(
    "page", ["README.md", *sorted(f"benchmark/{p.name}" for p in (ROOT / "benchmark").glob("*.md"))]
)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    for target, _, anchor in (link.partition("#") for link in re.findall(r"\]\(([^)]+)\)", text)):
        if target.startswith("https:"):
            continue
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
            assert anchor in [h.lower().replace(",", "").replace(" ", "-") for h in headings]


def test_readme_takes_five_minutes():
    assert len(README.encode()) <= 16_000
    assert "![" in README[:1_600]  # a picture on the first screen
