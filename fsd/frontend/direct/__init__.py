"""The direct front end: the kernel's FUSE protocol spoken by fsd itself (decision 0006)."""
