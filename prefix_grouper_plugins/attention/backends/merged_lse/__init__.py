"""The flash kernels that torch ships, called on rectangles of the forest and merged by log-sum-exp."""
