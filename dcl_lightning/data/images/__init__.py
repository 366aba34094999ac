"""Images in files: listing, reading and decoding."""
