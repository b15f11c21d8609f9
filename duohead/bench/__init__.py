"""Speed and memory, measured: each figure is a record, and its implementation passed the oracle in the same process."""
