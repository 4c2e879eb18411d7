"""`python -m ttl_utils`: the `ttl` command, also under `accelerate launch -m`."""

import sys

from ttl_utils.commands import main

sys.exit(main())
