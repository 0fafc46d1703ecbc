"""What a model loses where: tables, plots and pages for people."""

from dither.report.contents import Contents, Histogram, Stored, contents
from dither.report.diagnosis import Diagnosis, Overall, Row
from dither.report.layer_costs import diagnose
from dither.report.page import page, save_page

__all__ = [
    "Contents",
    "Diagnosis",
    "Histogram",
    "Overall",
    "Row",
    "Stored",
    "contents",
    "diagnose",
    "page",
    "save_page",
]
