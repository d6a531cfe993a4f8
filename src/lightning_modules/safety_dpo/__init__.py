"""SafetyDPO: low-rank safety experts trained by preference, and their merge into one adapter (arXiv 2412.10493)."""
