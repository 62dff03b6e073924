"""`python -m vauban.config` prints the configuration reference of the documentation."""

import sys

from vauban.config import reference

sys.stdout.write(reference())
