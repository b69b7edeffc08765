"""From results to report.md and report.html."""
