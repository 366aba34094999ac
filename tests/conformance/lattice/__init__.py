"""Whole configurations drawn at random, and what has to hold of each: the promises of this package in one place.

A *draw* has a value for each axis of ``SPACE``. It is either refused before the first step, in one line that names what
does not go together, or all of these hold:

- each row that is trained on or stored is a sample of the data set: its input, its label and its id;
- what is rehearsed was met before, and is of the tasks from which the configuration lets draw;
- the memory keeps to its budget and to the definition of its policy;
- a run that is resumed, from any step, ends bit for bit as the one that was not interrupted;
- a second agent, fitted on the same data module, and the first one fitted again, are trained as on a fresh one;
- modes of modules, ``requires_grad``, the trainer's callbacks, the data module and the environment stay as they were.

What is true is computed from ``Truth``: the samples' ids are written into their inputs, so that labels and tasks follow
from what the network gets, whatever the memory's own books say.
"""
