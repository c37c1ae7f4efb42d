"""What predictions need: trained networks, the preparation of pictures, the page, export."""

import support  # noqa: F401 (first: sets what torch reads from the environment)
