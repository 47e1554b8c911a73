"""Speed measured against peers, side by side in one run; every figure is a ratio on the machine that ran it."""
