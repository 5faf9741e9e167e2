"""`python -m lnp` is the command `lnp`."""

import sys

from lnp.cli import main

sys.exit(main())
