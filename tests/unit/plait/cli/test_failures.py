"""How failures are told."""

from __future__ import annotations

import pytest
import typer
from typer.testing import CliRunner, Result

from plait.cli.failures import FailuresGroup
from plait.errors import InvalidArgument, Violation


def run(error: BaseException, **env: str) -> Result:
    app = typer.Typer(cls=FailuresGroup, pretty_exceptions_enable=False)

    @app.callback()
    def nothing() -> None: ...

    @app.command()
    def fail() -> None:
        raise error

    return CliRunner().invoke(app, ["fail"], env={"COLUMNS": "400", "NO_COLOR": "1", "PLAIT_DEBUG": "", **env})


def test_our_errors_say_what_why_and_the_reason() -> None:
    error = InvalidArgument(
        "two things are wrong [sic]", reason="BAD", violations=[Violation("a.yaml:1", "is odd"), Violation("b.yaml:2", "is [bold]even[/]")]
    )
    result = run(error)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr == "error: two things are wrong [sic]  [BAD]\n  a.yaml:1: is odd\n  b.yaml:2: is [bold]even[/]\n"


def test_other_errors_are_ours_to_mend() -> None:
    result = run(ZeroDivisionError("division by zero"))
    assert result.exit_code == 1
    assert result.stderr == "error: ZeroDivisionError: division by zero\nthis is a fault of plait; PLAIT_DEBUG=1 shows where\n"


def test_debug_shows_the_traceback() -> None:
    error = ZeroDivisionError("division by zero")
    assert run(error, PLAIT_DEBUG="1").exception is error
    assert run(error, PLAIT_DEBUG="0").exception is not error


@pytest.mark.parametrize(
    ("signal", "code", "says"),
    [
        (typer.BadParameter("no such kind"), 2, "no such kind"),
        (typer.Exit(7), 7, ""),
        (typer.Abort(), 1, "Aborted"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_signals_of_the_framework_pass(signal: BaseException, code: int, says: str) -> None:
    result = run(signal)
    assert result.exit_code == code
    assert says in result.stderr
    assert "fault of plait" not in result.stderr
