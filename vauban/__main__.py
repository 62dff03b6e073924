"""`python -m vauban` is `vauban`."""

import sys

from vauban.cli import main

sys.exit(main())
