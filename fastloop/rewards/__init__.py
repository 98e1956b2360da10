"""Rewards: a registry, single calls, weighted sums, and workers that score one batch while the next is sampled.

A reward is called as ``reward(images, prompts, metadata)`` with uint8 pictures (n, height, width, 3), n prompts and n
metadata dictionaries, and returns n finite numbers; higher is better. The pictures are read-only, and all that it is given is
its own: nothing that it does to it reaches other rewards, metrics or saved samples. It may have

- ``validate(prompts, size)``, called with all prompts and the pictures' (height, width) before any model loads, which
  raises ``ValueError`` for what it cannot score;
- ``start()``, called once before the first call: loads its model, asks its server;
- ``explain(image, prompt)``, one line for the sample grids.
"""
