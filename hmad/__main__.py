"""``python -m hmad`` is the same program as ``hmad``."""

import sys

from hmad.edges.cli import main

sys.exit(main())
