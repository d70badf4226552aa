"""A node that ends with the evaluation that started it: stdin is a pipe that nobody else holds."""

import os
import signal
import sys
import threading

from hmad.edges import cli


def end_with_stdin() -> None:
    os.read(sys.stdin.fileno(), 1)  # nothing is ever written
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> int:
    threading.Thread(target=end_with_stdin, name="stdin", daemon=True).start()
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
