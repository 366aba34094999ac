"""The report of a run: ``content`` and ``counts`` collect it; ``text``, ``figures`` and ``paths`` write it."""
