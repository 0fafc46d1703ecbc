"""Spend a budget in bytes where the model needs it."""

from dither.calibrate.tuning import Course
from dither.search.calibrated import calibrated
from dither.search.compress import Beside, compress
from dither.search.compress_to import compress_to
from dither.search.joint import Aim, Evaluation, Joint, joint
from dither.search.joint_evaluation import Candidate
from dither.search.joint_space import Layout, Space
from dither.search.knowledge import Choice, Knowledge, Proposer, Sensitivity
from dither.search.ledger import Ledger
from dither.search.norm_means import correct_means
from dither.search.offering import Offering
from dither.search.outlook import Outlook, SizeOutlook, plan
from dither.search.policies import (
    AJPQ,
    POLICIES,
    Allocator,
    Evolution,
    Learner,
    Learning,
    Optuna,
    Policy,
    RandomPoints,
)
from dither.search.predict import can_quantize
from dither.search.proposers import (
    PROPOSERS,
    Grid,
    RotatedGrid,
    SparseProducts,
    Stored,
    TrellisGrid,
)
from dither.search.pruned import PrunedFirst
from dither.search.sensitivity import data_free, is_rotated, token_counts
from dither.search.size import LEAST_SHARE, SLACK_NBYTES, fills, parse_size
from dither.search.trials import Trial
from dither.search.tune import tune

__all__ = [
    "AJPQ",
    "LEAST_SHARE",
    "POLICIES",
    "PROPOSERS",
    "SLACK_NBYTES",
    "Aim",
    "Allocator",
    "Beside",
    "Candidate",
    "Choice",
    "Course",
    "Evaluation",
    "Evolution",
    "Grid",
    "Joint",
    "Knowledge",
    "Layout",
    "Learner",
    "Learning",
    "Ledger",
    "Offering",
    "Optuna",
    "Outlook",
    "Policy",
    "Proposer",
    "PrunedFirst",
    "RandomPoints",
    "RotatedGrid",
    "Sensitivity",
    "SizeOutlook",
    "Space",
    "SparseProducts",
    "Stored",
    "TrellisGrid",
    "Trial",
    "calibrated",
    "can_quantize",
    "compress",
    "compress_to",
    "correct_means",
    "data_free",
    "fills",
    "is_rotated",
    "joint",
    "parse_size",
    "plan",
    "token_counts",
    "tune",
]
