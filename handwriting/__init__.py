"""What predictions need: trained networks, the preparation of pictures, the page, export."""
