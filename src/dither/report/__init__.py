"""What a model loses where: tables, plots and pages for people."""

from dither.report.diagnosis import Diagnosis, Overall, Row
from dither.report.layers import diagnose

__all__ = ["Diagnosis", "Overall", "Row", "diagnose"]
