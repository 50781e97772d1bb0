"""What a person runs."""

import trainer  # noqa: F401 - before torch is imported: it holds the garbage collector back until all is
