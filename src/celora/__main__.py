"""The command line as a process of its own: `celora ...`, and `python -m celora`, for launchers that start modules."""

import atexit
import os
import sys
import time


def run() -> None:
    """Run a command and leave with its exit status.

    One of several processes leaves at once, after what is registered for the exit. Some of gloo's threads outlive the
    interpreter: with torch 2.13 one exit in seven is an abort, and the launcher calls a job failed that has succeeded.
    """
    began = time.perf_counter()  # before anything is imported that takes time
    try:
        from celora.cli.missing import missing

        if lacks := missing(*sys.argv[1:2]):
            print(f"error: {lacks}", file=sys.stderr)
            sys.exit(2)
        from celora.cli.main import main

        status = main(began=began)
    except KeyboardInterrupt:  # Ctrl-C while the command line itself is imported
        print("interrupted", file=sys.stderr)
        status = 130
    if os.environ.get("WORLD_SIZE", "1") != "1":
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    run()
