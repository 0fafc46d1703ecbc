"""Spend a budget in bytes where the model needs it."""

from dither.search.calibrated import calibrated
from dither.search.compress import compress
from dither.search.compress_to import compress_to
from dither.search.knowledge import Choice, Knowledge, Proposer, Sensitivity
from dither.search.ledger import Ledger
from dither.search.outlook import Outlook, SizeOutlook, plan
from dither.search.predict import can_quantize
from dither.search.proposers import PROPOSERS, Grid, RotatedGrid, Stored, TrellisGrid
from dither.search.sensitivity import data_free, token_counts
from dither.search.size import LEAST_SHARE, SLACK_NBYTES, fills, parse_size
from dither.search.trials import Trial

__all__ = [
    "LEAST_SHARE",
    "PROPOSERS",
    "SLACK_NBYTES",
    "Choice",
    "Grid",
    "Knowledge",
    "Ledger",
    "Outlook",
    "Proposer",
    "RotatedGrid",
    "Sensitivity",
    "SizeOutlook",
    "Stored",
    "TrellisGrid",
    "Trial",
    "calibrated",
    "can_quantize",
    "compress",
    "compress_to",
    "data_free",
    "fills",
    "parse_size",
    "plan",
    "token_counts",
]
