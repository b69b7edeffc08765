"""From a plan to outputs, verdicts and latencies."""
