"""The one implementation of POSIX semantics: operations as functions over an engine's transaction.

Every operation checks everything first and writes after: a refusal has written nothing.  Checks are made in Linux's
order (fs/namei.c, fs/attr.c), so that a caller sees the errno that a local file system would give.
One refusal may come after writes: QuotaExceeded, because what a change adds is often known only when it has been made.
So whoever applies an operation puts a savepoint before it, and rolls back to that.

| module | operations |
|---|---|
| inodes | what all share: attributes, usage, counters, the end of an inode |
| permissions | mode bits, sticky bit, names |
| lookup | lookup, getattr, readlink, readdir, usage |
| create | create, mknod, mkdir, symlink, link |
| remove | unlink, rmdir, release of held inodes |
| rename | rename, exchange |
| attributes | chmod, chown, utimens, truncate |
| xattrs | extended attributes |
| quotas | quotas of directory trees, and the attributes that show them |
| data | layout, inline data, extents, truncation |
"""
