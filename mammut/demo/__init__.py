"""The shipped demo model: what it is trained and judged on."""
