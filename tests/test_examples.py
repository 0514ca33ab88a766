"""Every program of docs/examples runs with its defaults, on as many ranks as its docstring says."""

import ast
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
from launching import ROOT, SECONDS, run_python

EXAMPLES = ROOT / "docs" / "examples"
PROGRAMS = sorted(EXAMPLES.glob("*.py"))
SCRIPTS = sorted(EXAMPLES.glob("*.sh"))


def names(paths):
    return [path.name for path in paths]


def docstring_of(program):
    """Return the docstring as it stands: cleaned, commands would lose their indentation where nothing else follows."""
    return ast.get_docstring(ast.parse(program.read_text()), clean=False) or ""


def ranks_of(program):
    """Return the ranks of the first command that a program's docstring shows."""
    command = rf"^ +(?:mpirun -n (\d+) )?python docs/examples/{re.escape(program.name)}"
    found = re.search(command, docstring_of(program), re.MULTILINE)
    assert found, f"{program.name} does not say how it is called"
    return int(found[1] or 1)


def missing_packages(program):
    """Return what a program imports and is not installed."""
    packages = set()
    for node in ast.walk(ast.parse(program.read_text())):
        if isinstance(node, ast.Import):
            packages |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            packages.add(node.module)
    return sorted(name for name in {package.partition(".")[0] for package in packages} if find_spec(name) is None)


def test_there_are_examples():
    assert len(PROGRAMS) >= 6
    assert SCRIPTS


@pytest.mark.parametrize("program", PROGRAMS, ids=names(PROGRAMS))
def test_example_runs_with_its_defaults(program, tmp_path):
    if missing := missing_packages(program):
        pytest.skip(f"needs {', '.join(missing)}")
    done = run_python(program, ranks=ranks_of(program), cwd=tmp_path)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert done.stdout.strip()


@pytest.mark.parametrize("program", PROGRAMS, ids=names(PROGRAMS))
def test_example_explains_its_options_and_shows_no_others(program):
    tree = ast.parse(program.read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    options = [call for call in calls if getattr(call.func, "attr", "") == "add_argument"]
    assert options
    assert all(any(keyword.arg == "help" for keyword in call.keywords) for call in options)
    commands = re.findall(r"^ .*", docstring_of(program), re.MULTILINE)
    shown = set(re.findall(r"(?<=\s)--[\w-]+", " ".join(commands)))
    assert shown <= {call.args[0].value for call in options}


@pytest.mark.parametrize("script", SCRIPTS, ids=names(SCRIPTS))
def test_script_has_no_mistake_that_shellcheck_finds(script):
    if shutil.which("shellcheck") is None:
        pytest.skip("needs shellcheck")
    done = subprocess.run(["shellcheck", script], capture_output=True, text=True, check=False, timeout=SECONDS)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", SCRIPTS, ids=names(SCRIPTS))
def test_script_calls_the_program_with_options_that_it_has(path):
    from longnet_hpc.command_line import parse

    text = path.read_text().replace("\\\n", " ")
    calls = re.findall(r"-m longnet_hpc (train .*)", text)
    assert calls
    for call in calls:
        words = [word.strip('"') for word in call.split()]
        command, config = parse(words, console=False)
        assert command == "train"
        assert config.seq_len == 1048576
    assert Path(path).stat().st_mode & 0o111
