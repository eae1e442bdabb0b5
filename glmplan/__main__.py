"""`glmplan` and `python -m glmplan`: Ctrl-C ends the program quietly while it is still loading, too."""

import signal


def main() -> None:
    """Load the commands and run them; until they are loaded, SIGINT ends the process as it does any C program."""
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ours:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from glmplan.cli.app import main as run

    if ours:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    run()


if __name__ == "__main__":
    main()
