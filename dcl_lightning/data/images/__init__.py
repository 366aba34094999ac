"""Images in files: which there are, and how processes read and decode them."""
