"""Reports on a run and on rows, each one self-contained HTML file: no script, no font or image to fetch."""
from report.data_report import write_data_report
from report.run_report import write_run_report

__all__ = ["write_data_report", "write_run_report"]
