"""The inode service: names, inodes, layouts, sessions, the cluster map.  Moves no file bytes but inline ones."""
