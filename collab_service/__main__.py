"""`collab`, also as `python -m collab_service`."""

import signal


def main() -> None:
    """Run the command. Ctrl-C while Python is still loading it ends it as well without a traceback."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is not signal.SIG_IGN:  # as it is in the background of a script
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from collab_service.cli.main import main as command

    signal.signal(signal.SIGINT, handler)
    command()


if __name__ == "__main__":
    main()
