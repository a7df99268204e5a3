"""Python functions of tensors as graphs of operations: recorded, simplified, replayed, and checked against what they replace."""
