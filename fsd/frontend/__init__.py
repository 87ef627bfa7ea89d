"""Front ends: what speaks the kernel's FUSE protocol and calls the file-system object."""
