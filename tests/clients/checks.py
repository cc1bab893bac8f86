"""What the Python client programs share: each exits 0 only if every check held, and never hangs."""

import json
import os
import signal
import sys
import traceback


def check(fact, holds, seen=None):
    """Prints the fact, or ends the program with it and what was seen instead."""
    if not holds:
        raise SystemExit(f"FAILED: {fact}: NO{'' if seen is None else f', but {seen}'}")
    print(f"ok  {fact}")


def same(fact, seen, expected):
    check(f"{fact}: {json.dumps(expected)}", seen == expected, seen)


def program(main, seconds=90):
    """Runs `main` at once; a program that hangs has failed."""

    def hangs(_signal, _frame):
        print(f"FAILED: not done after {seconds} seconds", file=sys.stderr, flush=True)
        os._exit(1)

    signal.signal(signal.SIGALRM, hangs)
    signal.alarm(seconds)
    try:
        main()
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        sys.exit(1)
