"""`python -m charlm` is the command `charlm`."""

import sys

from charlm.cli.__main__ import main

sys.exit(main())
