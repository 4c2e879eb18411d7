"""Task files for lm-evaluation-harness, and what they need in Python; README.md says where each comes from."""
