"""The report of one or more arms as a single HTML file."""

from kilobayes.report.build import build_page, write_report

__all__ = ["build_page", "write_report"]
