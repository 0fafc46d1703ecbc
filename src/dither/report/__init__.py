"""What a model loses where: tables, plots and pages for people."""

from dither.report.bars import check_picture
from dither.report.contents import Contents, Histogram, Stored, contents
from dither.report.diagnosis import Diagnosis, Overall, Row
from dither.report.layer_costs import diagnose
from dither.report.page import page, save_page
from dither.report.pair import pair_page, save_pair
from dither.report.sizes import draw_sizes
from dither.report.sweep import draw_sweep

__all__ = [
    "Contents",
    "Diagnosis",
    "Histogram",
    "Overall",
    "Row",
    "Stored",
    "check_picture",
    "contents",
    "diagnose",
    "draw_sizes",
    "draw_sweep",
    "page",
    "pair_page",
    "save_page",
    "save_pair",
]
