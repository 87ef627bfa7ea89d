"""The FUSE daemon: POSIX calls on one side, the inode service and the block servers on the other."""
