"""`collab session`: create, show, list, touch and delete sessions."""

import sys
from contextlib import aclosing
from typing import Annotated

import typer

from collab_service.cli.connection import SessionName, Target, connected, find_session
from collab_service.cli.failure import CommandError, ExitStatus
from collab_service.cli.loop import run
from collab_service.cli.output import Output, OutputOption, events_in_words, print_json, say, session_lines
from collab_service.client import DEFAULT_TARGET, Session
from collab_service.client.json_form import iso_time, session_form

app = typer.Typer(no_args_is_help=True, help="Create, show, list, touch and delete sessions.")

Language = Annotated[int | None, typer.Option("--language", metavar="N", help="The session's language_id.")]
Owner = Annotated[str | None, typer.Option("--owner", metavar="USER", help="The user who owns the session.")]


@app.command()
def create(
    room: Annotated[
        str | None, typer.Option(metavar="NAME", help="A name to find it by; no two sessions share one.")
    ] = None,
    owner: Owner = None,
    language: Language = None,
    target: Target = DEFAULT_TARGET,
    output: OutputOption = Output.TEXT,
) -> None:
    """Create a session. Where the room has one already, that one is shown, unchanged.

    Example: `collab session create --room minutes --owner ada`
    """

    async def work() -> None:
        async with connected(target) as client:
            session, created = await client.create_session(room=room, owner_id=owner, language_id=language)
        if output is Output.JSON:
            print_json(session_form(session))
        elif created:
            say(f"Session {session.id} created")
        else:
            say(f"Session {session.id} has this room already, with {events_in_words(session.last_server_seq)}")

    run(work())


@app.command()
def show(session: SessionName, target: Target = DEFAULT_TARGET, output: OutputOption = Output.TEXT) -> None:
    """Show a session and its head.

    Examples:

    * `collab session show 7`

    * `collab session show minutes --output json`
    """

    async def work() -> None:
        async with connected(target) as client:
            _show(await find_session(client, session), output)

    run(work())


@app.command("list")
def list_(
    owner: Owner = None,
    language: Language = None,
    limit: Annotated[int, typer.Option(min=0, metavar="N", help="At most so many; 0 lists all.")] = 100,
    target: Target = DEFAULT_TARGET,
    output: OutputOption = Output.TEXT,
) -> None:
    """List sessions, the most recently active first.

    Example: `collab session list --owner ada --limit 0`
    """

    async def work() -> None:
        lines, count = session_lines(output), 0
        async with (
            connected(target) as client,
            aclosing(client.list_sessions(owner_id=owner, language_id=language)) as sessions,
        ):
            async for session in sessions:
                if limit and count == limit:
                    print(f"Only the first {count:,} are shown; --limit 0 shows all of them.", file=sys.stderr)
                    break
                lines.print(session)
                count += 1

    run(work())


@app.command()
def touch(session: SessionName, target: Target = DEFAULT_TARGET, output: OutputOption = Output.TEXT) -> None:
    """Move a session's last activity to now.

    Example: `collab session touch 7`
    """

    async def work() -> None:
        async with connected(target) as client:
            _show(await client.touch_session((await find_session(client, session)).id), output)

    run(work())


@app.command()
def delete(
    session: SessionName,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Do not ask. (On a terminal it asks; in a script it never does.)")
    ] = False,
    target: Target = DEFAULT_TARGET,
) -> None:
    """Delete a session with all its events. `collab export` keeps a copy.

    Example: `collab session delete 7 --yes`
    """

    async def find() -> Session:
        async with connected(target) as client:
            return await find_session(client, session)

    async def work() -> None:
        async with connected(target) as client:
            await client.delete_session(found.id)

    found = run(find())
    what = f"session {found.id} with {events_in_words(found.last_server_seq)}"
    # Not in the midst of the work, where Ctrl-C would wait for the answer.
    if not yes and sys.stdin is not None and sys.stdin.isatty() and not _agrees(f"Delete {what}?"):
        raise CommandError("nothing was deleted", ExitStatus.INTERRUPTED)
    run(work())
    say(f"Deleted {what}")


def _agrees(question: str) -> bool:
    try:
        return typer.confirm(question, err=True)
    except typer.Abort:  # Ctrl-C or Ctrl-D
        print(file=sys.stderr)
        return False


def _show(session: Session, output: Output) -> None:
    if output is Output.JSON:
        print_json(session_form(session))
        return
    for name, value in (
        ("session", session.id),
        ("room", session.room),
        ("owner", session.owner_id),
        ("language", session.language_id),
        ("created", iso_time(session.created_at)),
        ("last active", iso_time(session.last_active)),
        ("events", f"{session.last_server_seq - session.first_server_seq + 1:,}"),
        ("last number", session.last_server_seq),
        ("chain", session.chain_hash.hex()),
    ):
        say(f"{name:<12} {'-' if value is None else value}")
