"""What this machine has and computes best with: memory and its limits, types and threads, versions. Knows no model."""
