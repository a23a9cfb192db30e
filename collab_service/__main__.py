"""`collab`, also as `python -m collab_service`."""

import signal
import sys

_INTERRUPTED = 130


def main() -> None:
    """Run the command. Ctrl-C while Python loads it, or is ending, ends it as well without a traceback."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is not signal.SIG_IGN:  # as it is in the background of a script
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from collab_service.cli.main import main as command

    try:
        try:
            signal.signal(signal.SIGINT, handler)
            command()
        finally:
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                signal.signal(signal.SIGINT, signal.SIG_DFL)
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)


if __name__ == "__main__":
    main()
