"""`glmplan` and `python -m glmplan`: Ctrl-C ends the program quietly while it is still loading, too."""

import signal


def main() -> None:
    """Load the commands and run them; until they are loaded, SIGINT ends the process as it does any C program."""
    usual = signal.getsignal(signal.SIGINT)
    if usual is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from glmplan.cli.app import main as run

    signal.signal(signal.SIGINT, usual)
    run()


if __name__ == "__main__":
    main()
