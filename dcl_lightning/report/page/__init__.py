"""A page to look at: a run's report, or a comparison of several, as one HTML file."""

from dcl_lightning.report.page.data import PAGE, PageRun, read_run
from dcl_lightning.report.page.document import page_text

__all__ = ["PAGE", "PageRun", "page_text", "read_run"]
