"""`python -m ast_dist COMMAND …`, the same as `ast-dist COMMAND …`."""

import sys

from ast_dist.cli import main

if __name__ == "__main__":
    sys.exit(main())
