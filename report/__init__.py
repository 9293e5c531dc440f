"""A run's report and a report on rows: one self-contained HTML file each."""
from report.data_report import write_data as write_data_report
from report.run_report import write as write_run_report

__all__ = ["write_data_report", "write_run_report"]
