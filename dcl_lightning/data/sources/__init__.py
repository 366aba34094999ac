"""Where samples come from: named data sets, arrays, and data sets of continuum."""
