"""What every command has in common: help, examples, completion, and no traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import typer
from typer.testing import Result

from plait.cli.main import app


def features_commands() -> list[str]:
    """The commands of the group `plait features`, those of its groups included."""
    group = typer.main.get_command(app).commands["features"]  # type: ignore[attr-defined]
    return sorted(f"{name} {leaf}".strip() for name, command in group.commands.items() for leaf in getattr(command, "commands", ("",)))


YAML = ("features import-feast",)  # its answer is manifests, which programs read as they are
COMMANDS = ("up", "demo", "bench", "apply", "get", "describe", "rank", "migrate", "version", "features")

Plait = Callable[..., Result]


def test_help_names_every_command_and_where_to_start(plait: Plait) -> None:
    for words in (("--help",), ("-h",), ()):
        result = plait(*words)
        assert "Start here:" in result.stdout + result.stderr
        for command in COMMANDS:
            assert f" {command} " in result.stdout + result.stderr
    assert plait("--help").exit_code == 0


@pytest.mark.parametrize("command", [*(c for c in COMMANDS if c != "features"), *(f"features {c}" for c in features_commands())])
def test_each_command_has_an_example_and_json(plait: Plait, command: str) -> None:
    for option in ("--help", "-h"):
        result = plait(*command.split(), option)
        assert result.exit_code == 0
        assert f"Example:  plait {command}" in result.stdout
        assert "--json" in result.stdout or command in YAML


@pytest.mark.parametrize("words", [["rnk"], ["--nope"], ["rank", "--nope"], ["rank"], ["describe", "model"]])
def test_wrong_usage_is_told_and_ends_with_2(plait: Plait, words: list[str]) -> None:
    result = plait(*words)
    assert result.exit_code == 2
    assert "Error" in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_can_be_shown(shell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")  # else it is for the shell this runs under, if any
    result = _process("--show-completion", shell)
    assert (result.returncode, result.stderr) == (0, "")
    assert "_PLAIT_COMPLETE" in result.stdout or "_PYTHON" in result.stdout


@pytest.mark.parametrize(
    ("line", "offers"),
    [
        ("plait d", ["demo", "describe"]),
        ("plait get mo", ["models"]),
        ("plait describe feature", ["featureviews", "featuresets"]),
        ("plait rank --exp", ["--explain"]),
        ("plait bench ra", ["rank"]),
        ("plait demo m", ["marketplace"]),
        ("plait demo nothing", []),
    ],
)
def test_the_shell_completes(line: str, offers: list[str]) -> None:
    env = {"_PLAIT_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
    program = "import sys; sys.argv[0] = 'plait'; from plait.cli.main import app; app(prog_name='plait')"
    result = subprocess.run([sys.executable, "-c", program], env={**os.environ, **env}, capture_output=True, text=True, check=False)
    assert (sorted(result.stdout.split()), result.stderr) == (sorted(offers), "")


def test_help_is_quick_because_it_loads_nothing_heavy() -> None:
    program = """
import sys
from plait.cli.main import main
try:
    main()
except SystemExit:
    print(*sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", program, "--help"], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in result.stdout.split("\n")[-2].split()}
    assert "typer" in loaded
    assert loaded.isdisjoint({"grpc", "google", "numpy", "pydantic", "asyncpg", "redis", "yaml", "torch", "opentelemetry"})


def test_module_and_script_are_the_same() -> None:
    result = _process("version")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("plait ")


def test_a_reader_that_goes_away_is_no_failure() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        result = subprocess.run(
            [sys.executable, "-m", "plait.cli", "version"], stdout=writer, stderr=subprocess.PIPE, text=True, check=False
        )
    finally:
        os.close(writer)
    assert "Traceback" not in result.stderr
    assert "fault of plait" not in result.stderr


def test_a_title_in_any_script_reaches_a_plain_terminal() -> None:
    program = (
        "import sys; from plait.cli.main import main; sys.argv = ['plait', 'version']\ntry: main()\nexcept SystemExit: print('Amélie')"
    )
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    result = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
    assert result.stdout.endswith("Am?lie\n")


def _process(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "plait.cli", *words], capture_output=True, text=True, check=False)
