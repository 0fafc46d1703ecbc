"""Which of many files is best, with few labels or few trials.

A sweep leaves many files, and scoring each on everything is what costs. Two things can be scarce:

- *trials*: one candidate is run on some samples, or for a while, and its feedback comes back.
  :class:`AOE` has a model of the feedback and shares what it learns among candidates that say the
  same; :class:`MetricSearch` has a model of the scores alone; :class:`SuccessiveHalving` and
  :class:`UniformTrials` have none.
- *labels*: what every candidate says is known, and what is right costs. :class:`SMDAMA` learns how
  to mix the candidates; :class:`ModelPicker` asks where they differ; :class:`UniformLabels` asks at
  random.

All of them are asked what to do next, told what came of it, and give an :class:`Answer` with its
uncertainty at any time; ``state()`` is JSON, so that a choice may take weeks. What is saved is
evaluations: no chooser makes a file better.
"""

from dither.select.answer import Answer
from dither.select.aoe import AOE, class_features
from dither.select.labels import Labels, UniformLabels
from dither.select.metric_search import MetricSearch
from dither.select.model_picker import ModelPicker
from dither.select.smd_ama import SMDAMA
from dither.select.trials import SuccessiveHalving, Trial, Trials, UniformTrials

__all__ = [
    "AOE",
    "SMDAMA",
    "Answer",
    "Labels",
    "MetricSearch",
    "ModelPicker",
    "SuccessiveHalving",
    "Trial",
    "Trials",
    "UniformLabels",
    "UniformTrials",
    "class_features",
]
