"""What teaches `collab`: help with examples that work, documented exit statuses, completion, sentences for mistakes."""

import json
import re
import shlex
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from collab_service.cli import doctor
from collab_service.cli.failure import ExitStatus
from collab_service.cli.main import app
from collab_service.v1.collab_service_pb2_grpc import CollabServiceStub
from tests.cli.gate import wait_until
from tests.cli.here import Here
from tests.cli.test_session import unique
from tests.processes import COLLAB, ServeProcess, clean_environment
from tests.rpc.calls import TIMEOUT, append, new_session

DOCUMENT = Path(__file__).parent.parent.parent / "docs" / "command-line.md"
ROOT: Any = typer.main.get_command(app)


def commands(group: Any = ROOT, *path: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield all commands with what one types to reach them."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, *path, name)
        else:
            yield (*path, name), command


COMMANDS = dict(commands())


def check_command_line(text: str) -> tuple[str, ...]:
    """Parse a command line as the shell and `collab` do, without running it; return the command's name."""
    words = shlex.split(text, comments=True)
    assert words.pop(0) == "collab"
    path = tuple(words[:2]) if tuple(words[:2]) in COMMANDS else tuple(words[:1])
    COMMANDS[path].make_context(" ".join(path), words[len(path) :])
    return path


@pytest.mark.parametrize("path", list(COMMANDS), ids=" ".join)
def test_every_command_has_help_with_an_example(here: Here, path: tuple[str, ...]) -> None:
    """`--help` says what it does in a sentence, what each option means, and shows a command line that is right."""
    command = COMMANDS[path]
    assert re.match(r"[A-Z][^\n]*[.:]", command.help)
    for parameter in command.params:
        assert parameter.help, parameter.name
    examples = re.findall(
        r"`(?:[^`|]+\| )?(collab [^`|]*?)(?: \|[^`]*| >[^`]*)?`", command.help.partition("Example")[2]
    )
    assert examples
    assert [check_command_line(example) for example in examples] == len(examples) * [path]
    said = here.say(*path, "--help")
    assert "Example" in said
    assert f"Usage: collab {' '.join(path)} " in said


def test_the_first_help_teaches(here: Here) -> None:
    """`collab --help` names every command, every exit status, and the first things to type, which are right."""
    said = here.say("--help")
    for path in COMMANDS:
        assert re.search(rf"^\W+{path[0]} +\w", said, re.MULTILINE), path
    told = re.search(r"Exit status: (.*)", ROOT.help, re.DOTALL)
    assert told is not None
    assert [int(number) for number in re.findall(r"\d+", told[1])] == list(ExitStatus)
    for example in re.findall(r"`(collab [^`]+)`", ROOT.help):
        check_command_line(example)


def test_the_document_tells_the_exit_statuses() -> None:
    """The table in docs/command-line.md has each status that there is, and no other."""
    rows = re.findall(r"^\| (\d+) \| \w", DOCUMENT.read_text(), re.MULTILINE)
    assert [int(row) for row in rows] == list(ExitStatus)


def test_the_document_names_every_command_and_variable() -> None:
    """Its table has every command; its variables are those of the options, but for serve's and the gateway's own."""
    text = DOCUMENT.read_text()
    table = text[text.index("| command |") : text.index("**Naming")]
    for path in COMMANDS:
        assert re.search(rf"`(session )?{path[-1]}\b", table), path
    variables = {
        parameter.envvar
        for path, command in COMMANDS.items()
        if path not in (("serve",), ("gateway",))
        for parameter in command.params
        if parameter.envvar
    }
    assert set(re.findall(r"^\| `(COLLAB_\w+)`", text, re.MULTILINE)) == variables


def test_what_the_document_shows_works(here: Here, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its first block of commands runs as it stands, one after the other, but for the room, which may be taken."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "_SLOW", 3600.0)  # a busy machine is not what this is about
    block = DOCUMENT.read_text().split("\n\n    ")[1].split("\n\n")[0]
    room = unique("minutes").replace(" ", "-")
    said = []
    for line in block.replace("minutes", room).splitlines():
        before, pipe, after = line.strip().rpartition(" | ")
        words = shlex.split(after)
        assert words.pop(0) == "collab"
        stdin = subprocess.check_output(["sh", "-c", before]) if pipe else None
        ended = here.run(*words, stdin=stdin)
        assert ended.status == 0, line
        said.append(ended.out)
    assert len(said) > 10
    assert [line.split("  ", 4)[4] for line in said[3].splitlines()] == ['{"n": 1}', '{"n": 2}']
    assert json.loads(said[-2])["payload"] == {"text": "hello"}
    assert list(tmp_path.iterdir()) == [tmp_path / f"{room}.jsonl"]


def test_a_shell_completes(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """Completion can be installed: there is a script for each shell, and it asks `collab` for words."""
    for shell in ("bash", "zsh", "fish"):
        monkeypatch.setenv("_COLLAB_COMPLETE", f"source_{shell}")
        assert "_COLLAB_COMPLETE=complete_" in here.run().out
    monkeypatch.setenv("_COLLAB_COMPLETE", "complete_bash")
    for typed, words in (
        ("collab ex", ["export"]),
        ("collab session ", ["create", "show", "list", "touch", "delete"]),
        ("collab append 1 --cl", ["--client-seq"]),
    ):
        monkeypatch.setenv("COMP_WORDS", typed)
        monkeypatch.setenv("COMP_CWORD", str(typed.count(" ")))
        assert here.run().out.split() == words


def test_mistakes_that_a_person_makes(here: Here, stub: CollabServiceStub, tmp_path: Path) -> None:
    """Each is one sentence that helps, with the status that scripts can tell it by."""
    session_id = new_session(stub)
    append(stub, session_id)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        nobody = f"127.0.0.1:{taken.getsockname()[1]}"
        for arguments, status, words in (
            (("list", 1, "--target", nobody), 3, f"answers at {nobody} .*Start one with: collab serve"),
            (("list", 1, "--target", "localhost"), 2, "'localhost' is no address .* looks like 127.0.0.1:50051"),
            (("list", 1, "--target", "localhost:"), 2, "looks like 127.0.0.1:50051"),
            (("list", 1, "--target", "localhost:http"), 2, "looks like 127.0.0.1:50051"),
            (("list", 1, "--target", "localhost:65536"), 2, "looks like 127.0.0.1:50051"),
            (("list", 1, "--target", ":50051"), 2, "looks like 127.0.0.1:50051"),
            (("list", 1, "--target", ""), 2, "looks like 127.0.0.1:50051"),
            (("list", 1, "--target", "http://127.0.0.1:50051"), 2, "looks like 127.0.0.1:50051"),
            (("list", 1, "--target", "nobody.invalid:50051"), 3, "answers at nobody.invalid:50051"),
            (("list", 999_999_999), 4, "there is no session 999999999; see those .*: collab session list"),
            (("list", "no such room"), 4, "no session with the room 'no such room'; see .*: collab session list"),
            (("tail", "no such room"), 4, "no session with the room 'no such room'"),
            (("append", "no such room", "--json", "{}"), 4, "no session with the room 'no such room'"),
            (("export", "no such room", tmp_path / "x"), 4, "no session with the room 'no such room'"),
            (("verify", "no such room"), 4, "neither a file 'no such room' nor a session with this room"),
            (("list", 0), 1, "session_id: must be at least 1"),
            (("list", ""), 1, "room: must not be empty"),
            (("list", "room:"), 1, "room: must not be empty"),
            (("list", 2**63), 1, str(2**63)),
            (("list", session_id, "--since", 2), 1, "since_server_seq is 2, but the session's last number is 1"),
            (("list", session_id, "--types", "a,"), 1, "must not be empty"),
            (("session", "create", "--language", 0), 1, "language_id: must be at least 1"),
            (("session", "create", "--room", ""), 1, "room: must not be empty"),
            (("session", "create", "--room", "\udcff"), 1, "room cannot be"),
            (("session", "list", "--owner", ""), 1, "owner_id: must not be empty"),
            (("import", DOCUMENT), 1, "its first line is no header"),
            (("replay", DOCUMENT), 1, "is no recording: it should be gzipped JSON"),
        ):
            assert re.search(words, here.refused(*arguments, status=status))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("lst",), "No such command 'lst'"),
        (("list",), "Missing argument 'SESSION'"),
        (("list", "1", "2"), "unexpected extra argument"),
        (("list", "1", "--sinc", "2"), "No such option: --sinc"),
        (("list", "1", "--since", "x"), "--since"),
        (("list", "1", "--since", "-1"), "--since"),
        (("list", "1", "-o", "yaml"), "'yaml' is not one of 'text', 'json'"),
        (("session", "create", "--language", "x"), "--language"),
    ],
)
def test_a_wrong_command_line(here: Here, arguments: tuple[str, ...], words: str) -> None:
    """It is told with the usage, or how to see it, and status 2."""
    ended = here.run(*arguments)
    assert (ended.status, ended.out) == (2, "")
    assert words in re.sub(r"[\s│]+", " ", ended.err)
    assert "-h' for help" in ended.err


def _catches_interrupt(pid: int) -> bool:
    """Tell whether a process has a handler of its own for Ctrl-C."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(caught & 1 << (signal.SIGINT - 1))


def _is_ours(pid: int) -> bool:
    return not _catches_interrupt(pid) or _has_loaded(pid, "cygrpc")


def _has_loaded(pid: int, library: str) -> bool:
    return library in Path(f"/proc/{pid}/maps").read_text()


@pytest.mark.parametrize("library", ["msgspec/_core", "grpc/_cython/cygrpc", "uvloop/loop", ""])
def test_ctrl_c_while_it_starts(server: ServeProcess, stub: CollabServiceStub, library: str) -> None:
    """Whatever Python is loading just then, it ends without a word, as if interrupted later."""
    session_id = new_session(stub)
    command = [*COLLAB, "append", str(session_id), "-", "--target", server.grpc_address]
    environment = clean_environment()
    for _ in range(3):
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        ) as process:
            if library:
                wait_until(lambda: _has_loaded(process.pid, library), f"the loading of {library}")
            else:  # Python is there, and then our first line has been run
                wait_until(lambda: _catches_interrupt(process.pid), "the start of Python")
                wait_until(lambda: _is_ours(process.pid), "our own start")
            process.send_signal(signal.SIGINT)
            process.wait(TIMEOUT)
            out, err = process.communicate()
        assert process.returncode in (-signal.SIGINT, 130)
        assert out == ""
        assert err in ("", "collab: interrupted; nothing was stored; try again\n")
