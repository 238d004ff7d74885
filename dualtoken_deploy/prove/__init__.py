"""What the next person can check: baselines, signatures, bills of materials, reports, remaking."""
