"""What predictions need: trained networks, the preparation of pictures, the page, export."""

import training  # noqa: F401 (first: sets what torch reads from the environment)
